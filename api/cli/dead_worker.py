"""What the supervisor knows before any timeout: this worker is dead. Its runs go on at once instead of at expiry.

Nothing is kept open between deaths: a connection would be old and perhaps broken by the time it is needed.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator

import structlog
from sqlalchemy.exc import SQLAlchemyError

from jobs.app import make_app
from jobs.dispatch import Dispatcher
from jobs.settings import JobsSettings
from storage import deaths
from storage.database import Database
from storage.deaths import Cause, Freed
from storage.errors import StorageError
from storage.settings import StorageSettings

log = structlog.get_logger()

NOBODY = ""
WAITS_S = (0.2, 0.5, 1.0, 2.0, 4.0)
"""Between attempts: a database that restarts is back within seconds."""


def rehearse(settings: StorageSettings) -> None:
    """Go the whole way for a worker that does not exist, so that a death finds everything loaded."""
    with contextlib.suppress(Exception), _opened(settings) as database:  # it is no more than a rehearsal
        release(database, NOBODY, Cause.STOPPED)
        _announce(settings, database, Freed((), num_samples=1))  # that samples wait is a hint, and may be wrong


def free_worker(settings: StorageSettings, worker_id: str, say: Callable[[str], None], cause: Cause) -> None:
    """Free the leases and claims of a dead worker, hold its death against what it was executing, announce its work.

    Nothing depends on it: where the database stays away, leases expire and the scheduler announces.
    """
    for wait_s in (*WAITS_S, None):
        try:
            with _opened(settings) as database:
                freed = release(database, worker_id, cause)
                log.info("worker_freed", worker=worker_id, cause=cause, runs=len(freed.runs), samples=freed.num_samples)
                _announce(settings, database, freed)
            return
        except (StorageError, SQLAlchemyError, OSError) as error:
            if wait_s is None:
                say(f"the work of {worker_id} was not handed on at once, it will be when its leases expire: {error}")
            else:
                time.sleep(wait_s * random.uniform(0.5, 1.5))  # noqa: S311 (no secret)


def release(database: Database, worker_id: str, cause: Cause) -> Freed:
    """Take everything from a dead worker."""
    with database.begin() as tx:
        return deaths.note_death(tx, worker_id, cause, now=database.now(tx))


def _announce(settings: StorageSettings, database: Database, freed: Freed) -> None:
    if not freed.runs and not freed.num_samples:
        return
    jobs_settings = JobsSettings(data_dir=settings.data_dir)
    with make_app(jobs_settings) as app:
        dispatcher = Dispatcher(app, database, message_expires_s=jobs_settings.message_expires_s)
        for run in freed.runs:
            dispatcher.announce_run(run)
        if freed.num_samples:
            dispatcher.announce_samples()
    log.info("work_announced", runs=len(freed.runs))


@contextlib.contextmanager
def _opened(settings: StorageSettings) -> Iterator[Database]:
    database = Database(settings.resolved_database_url(), sqlite_synchronous=settings.sqlite_synchronous)
    try:
        yield database
    finally:
        database.close()
