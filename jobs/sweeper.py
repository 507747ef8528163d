"""Finds stalled work and announces it again: a lost message, a dead worker, a `seq` that never arrives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import structlog

from billing import pauses
from jobs.dispatch import Announces
from jobs.reminders import Reminders, Waiting
from jobs.settings import JobsSettings
from storage import claims, failpoints, ids, journal, runs
from storage.database import Database
from storage.failpoints import Point

log = structlog.get_logger()

PAGE = 500
STALLED_MAX = 10_000
SAMPLES = "samples"
"""Stands for all samples among the names of runs, none of which is so short."""
PLACES_PER_PASS = 100
"""A wide gap is closed over several passes: each of its places is a row, and a write transaction is short."""


@dataclass(frozen=True)
class Swept:
    """What one pass found."""

    runs_announced: int
    claims_released: int
    gaps_closed: int


def sweep(
    database: Database,
    announcer: Announces[object],
    publish: Callable[[Sequence[str]], object],
    settings: JobsSettings,
    reminders: Reminders,
) -> Swept:
    """Announce stalled runs and samples again, and close gaps that timed out.

    Args:
        publish: tells those who wait that these request ids have an outcome.
        reminders: keeps, from pass to pass, what was announced when.
    """
    closed = close_gaps(database, publish, gap_timeout_s=settings.gap_timeout_s)
    with database.begin() as tx:
        now = database.now(tx)
        released = claims.release_claims(tx, now=now)
    with database.read() as tx:
        stalled_since = now - timedelta(seconds=settings.stalled_after_s)
        stalled = journal.stalled_runs(tx, now=now, accepted_before=stalled_since, limit=STALLED_MAX)
        paused = pauses.waiting_runs(tx, [run.id for run in stalled], now=now)
        sample = claims.oldest_waiting_sample(tx, among=pauses.unpaused(tx, now=now))
    waiting = [
        Waiting(run.id, (run.state_seq, run.lease_epoch, run.held), held=run.held)
        for run in stalled
        if run.id not in paused
    ]
    if sample is not None:
        waiting.insert(0, Waiting(SAMPLES, sample))
    due = reminders.due(waiting, now=now, limit=PAGE)
    failpoints.reach(Point.STALLED_FOUND)
    if SAMPLES in due or released:
        announcer.announce_samples()
    stalled_ids = [name for name in due if name != SAMPLES]
    for run_id in {*stalled_ids, *(run_id for run_id, _ in closed)}:
        announcer.announce_run(run_id)
    failpoints.reach(Point.STALLED_ANNOUNCED)
    if stalled_ids or released or closed:
        log.info("swept", runs=len(stalled_ids), claims=released, gaps=len(closed))
    return Swept(len(stalled_ids), released, len(closed))


def close_gaps(
    database: Database, publish: Callable[[Sequence[str]], object], *, gap_timeout_s: float
) -> list[tuple[str, int]]:
    """Give every `seq` that did not arrive in time a stored error; returns (run, `seq`) of each."""
    with database.read() as tx:
        too_old = database.now(tx) - timedelta(seconds=gap_timeout_s)
        gaps = journal.gaps(tx, accepted_before=too_old, limit=PAGE)
        waiting = {run_id for run_id, _, last in gaps if runs.refused_before(tx, run_id, last, now=database.now(tx))}
    closed: list[tuple[str, int]] = []
    for run_id, first, present in gaps:
        if run_id in waiting:
            continue  # a cap has no room for what is missing, and its client asks again
        with database.begin() as tx:
            now = database.now(tx)
            for seq in range(first, min(present, first + PLACES_PER_PASS)):
                error = (
                    f"seq_id {seq} did not arrive within {gap_timeout_s:.0f} s while seq_id {present} waited; "
                    "it was closed so that later operations go on"
                )
                if journal.close_gap(tx, run_id, seq, error=error, now=now):
                    closed.append((run_id, seq))
    publish([ids.training_request_id(run_id, seq) for run_id, seq in closed])
    return closed
