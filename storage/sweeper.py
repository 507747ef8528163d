"""Deletes what nothing needs any more: rows in short transactions, then the objects they named.

A pass goes on until nothing is left to do, or its time is over; each transaction handles a page.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from storage import checkpoints, failpoints, journal, runs, uploads
from storage.database import Database
from storage.failpoints import Point
from storage.objects import ObjectStore

PAGE = 100
WEIGHTS_PAGE = 20
"""Whether weights are still needed is looked up one by one, so that fewer fit into a short transaction."""
FOUND_MAX = 20_000
"""So many expired outcomes are looked up at once."""


@dataclass(frozen=True)
class Swept:
    """What one pass removed.

    Attributes:
        is_complete: whether nothing was left to do when its time was over.
    """

    outcomes: int = 0
    checkpoints: int = 0
    sampling_sessions: int = 0
    objects: int = 0
    is_complete: bool = True


def sweep(
    database: Database,
    objects: ObjectStore,
    *,
    result_retention_s: float,
    sampling_session_idle_s: float,
    pass_s: float,
) -> Swept:
    """Expire outcomes, checkpoints and abandoned sampling sessions, and delete objects that no row names.

    Two passes at once are harmless.

    Args:
        pass_s: after this long no further page is begun; each kind has been begun by then. The next pass goes on.
    """
    with database.read() as tx:
        now = database.now(tx)
    silent_since = now - timedelta(seconds=sampling_session_idle_s)
    watch = _Watch(time.monotonic() + pass_s)
    outcomes = _expire_outcomes(database, watch, finished_before=now - timedelta(seconds=result_retention_s))
    return Swept(
        outcomes=outcomes,
        checkpoints=_in_pages(watch, lambda: _remove_checkpoints(database, now), WEIGHTS_PAGE),
        sampling_sessions=_in_pages(watch, lambda: _end_sampling_sessions(database, silent_since, now), WEIGHTS_PAGE),
        objects=_in_pages(watch, lambda: _delete_objects(database, objects), PAGE),
        is_complete=not watch.stopped,
    )


@dataclass
class _Watch:
    """When to begin no further page, and whether any was left out for that."""

    ends_at: float
    stopped: bool = False

    def allows(self) -> bool:
        """Whether there is time for another page."""
        self.stopped = self.stopped or time.monotonic() > self.ends_at
        return not self.stopped


def _in_pages(watch: _Watch, handle_page: Callable[[], int], page: int) -> int:
    total = handled = handle_page()
    while handled == page and watch.allows():
        handled = handle_page()
        total += handled
    return total


def _expire_outcomes(database: Database, watch: _Watch, *, finished_before: datetime) -> int:
    with database.read() as tx:  # much may have to be passed over that a replay still needs: no writer waits for that
        old = journal.outcomes_to_expire(tx, finished_before=finished_before, limit=FOUND_MAX)
    total = 0
    for first in range(0, len(old), PAGE):
        if not watch.allows():
            break
        with database.begin() as tx:
            expired = journal.expire_outcomes(tx, old[first : first + PAGE])
            uploads.release(tx, *expired.object_keys)
            checkpoints.release_unneeded(tx, expired.loads_keys)
        failpoints.reach(Point.OUTCOMES_EXPIRED)
        total += expired.outcomes
    watch.stopped = watch.stopped or len(old) == FOUND_MAX
    return total


def _remove_checkpoints(database: Database, now: datetime) -> int:
    with database.begin() as tx:
        return checkpoints.remove_expired(tx, now=now, limit=WEIGHTS_PAGE)


def _end_sampling_sessions(database: Database, silent_since: datetime, now: datetime) -> int:
    with database.begin() as tx:
        ended = runs.end_abandoned_sampling_sessions(tx, silent_since=silent_since, now=now, limit=WEIGHTS_PAGE)
        checkpoints.release_unneeded(tx, ended)
    return len(ended)


def _delete_objects(database: Database, objects: ObjectStore) -> int:
    with database.begin() as tx:
        keys = uploads.take_unwanted(tx, now=database.now(tx), limit=PAGE)
    if keys:
        failpoints.reach(Point.OBJECTS_DOOMED)
        objects.delete(keys)
        failpoints.reach(Point.OBJECTS_DELETED)
        with database.begin() as tx:
            uploads.forget(tx, keys, now=database.now(tx))
        failpoints.reach(Point.OBJECTS_FORGOTTEN)
    return len(keys)
