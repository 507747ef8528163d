"""Finds stalled work and announces it again: a lost message, a dead worker, a `seq` that never arrives."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import structlog

from jobs.dispatch import Dispatcher
from jobs.results import OutcomePublisher
from jobs.settings import JobsSettings
from storage import ids, journal
from storage.database import Database

log = structlog.get_logger()

PAGE = 500
PLACES_PER_PASS = 100
"""A wide gap is closed over several passes: each of its places is a row, and a write transaction is short."""


@dataclass(frozen=True)
class Swept:
    """What one pass found."""

    runs_announced: int
    claims_released: int
    gaps_closed: int


def sweep(database: Database, dispatcher: Dispatcher, publisher: OutcomePublisher, settings: JobsSettings) -> Swept:
    """Announce stalled runs and samples again, and close gaps that timed out."""
    closed = close_gaps(database, publisher, gap_timeout_s=settings.gap_timeout_s)
    with database.begin() as tx:
        now = database.now(tx)
        released = journal.release_claims(tx, now=now)
    with database.read() as tx:
        stalled_since = now - timedelta(seconds=settings.stalled_after_s)
        stalled = journal.stalled_runs(tx, now=now, accepted_before=stalled_since, limit=PAGE)
        samples = journal.samples_wait(tx)
    for run_id in {*stalled, *(run_id for run_id, _ in closed)}:
        dispatcher.announce_run(run_id)
    if samples:
        dispatcher.announce_samples()
    if stalled or released or closed:
        log.info("swept", runs=len(stalled), claims=released, gaps=len(closed))
    return Swept(len(stalled), released, len(closed))


def close_gaps(database: Database, publisher: OutcomePublisher, *, gap_timeout_s: float) -> list[tuple[str, int]]:
    """Give every `seq` that did not arrive in time a stored error; returns (run, `seq`) of each."""
    with database.read() as tx:
        too_old = database.now(tx) - timedelta(seconds=gap_timeout_s)
        gaps = journal.gaps(tx, accepted_before=too_old, limit=PAGE)
    closed: list[tuple[str, int]] = []
    for run_id, first, present in gaps:
        with database.begin() as tx:
            now = database.now(tx)
            for seq in range(first, min(present, first + PLACES_PER_PASS)):
                error = (
                    f"seq_id {seq} did not arrive within {gap_timeout_s:.0f} s while seq_id {present} waited; "
                    "it was closed so that later operations go on"
                )
                if journal.close_gap(tx, run_id, seq, error=error, now=now):
                    closed.append((run_id, seq))
    publisher.publish([ids.training_request_id(run_id, seq) for run_id, seq in closed])
    return closed
