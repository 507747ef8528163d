"""Deletes what nothing needs any more: rows first, in a short transaction, then the objects they named."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from storage import checkpoints, journal, uploads
from storage.database import Database
from storage.objects import ObjectStore

PAGE = 200


@dataclass(frozen=True)
class Swept:
    """What one pass removed."""

    outcomes: int
    checkpoints: int
    objects: int


def sweep(database: Database, objects: ObjectStore, *, result_retention_s: float) -> Swept:
    """Expire outcomes and checkpoints, and delete objects that no row names. At most one page of each a call."""
    with database.begin() as tx:
        now = database.now(tx)
        before = now - timedelta(seconds=result_retention_s)
        expired = journal.expire_outcomes(tx, finished_before=before, limit=PAGE)
        for key in expired.object_keys:
            uploads.release(tx, key)
        checkpoints.release_unneeded(tx, expired.loads_keys)
        gone = checkpoints.remove_expired(tx, now=now, limit=PAGE)
    with database.begin() as tx:
        keys = uploads.take_unwanted(tx, now=database.now(tx), limit=PAGE)
    if keys:
        objects.delete(keys)
    return Swept(outcomes=expired.outcomes, checkpoints=gone, objects=len(keys))
