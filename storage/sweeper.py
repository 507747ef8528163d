"""Deletes what nothing needs any more: rows first, in a short transaction, then the objects they named."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from storage import checkpoints, journal, runs, uploads
from storage.database import Database
from storage.objects import ObjectStore

PAGE = 200


@dataclass(frozen=True)
class Swept:
    """What one pass removed."""

    outcomes: int = 0
    checkpoints: int = 0
    sampling_sessions: int = 0
    objects: int = 0


def sweep(
    database: Database, objects: ObjectStore, *, result_retention_s: float, sampling_session_idle_s: float
) -> Swept:
    """Expire outcomes, checkpoints and abandoned sampling sessions, and delete objects that no row names.

    At most one page of each a call, so that no transaction is long.
    """
    with database.begin() as tx:
        now = database.now(tx)
        before = now - timedelta(seconds=result_retention_s)
        expired = journal.expire_outcomes(tx, finished_before=before, limit=PAGE)
        for key in expired.object_keys:
            uploads.release(tx, key)
        checkpoints.release_unneeded(tx, expired.loads_keys)
        gone = checkpoints.remove_expired(tx, now=now, limit=PAGE)
        silent_since = now - timedelta(seconds=sampling_session_idle_s)
        ended = runs.end_abandoned_sampling_sessions(tx, silent_since=silent_since, now=now, limit=PAGE)
        checkpoints.release_unneeded(tx, ended)
    with database.begin() as tx:
        keys = uploads.take_unwanted(tx, now=database.now(tx), limit=PAGE)
    if keys:
        objects.delete(keys)
    return Swept(outcomes=expired.outcomes, checkpoints=gone, sampling_sessions=len(ended), objects=len(keys))
