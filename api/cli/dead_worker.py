"""What the supervisor knows before any timeout: this worker is dead. Its runs go on at once instead of at expiry."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from storage.database import Database
from storage.settings import StorageSettings

if TYPE_CHECKING:
    from storage.deaths import Cause, Freed


def free_worker(
    settings: StorageSettings, worker_id: str, say: Callable[[str], None], cause: Cause | None = None
) -> None:
    """Free the leases and claims of a dead worker, hold its death against what it was executing, announce its work.

    Nothing depends on it: where database or broker cannot be reached now, leases expire and the scheduler announces.
    """
    from sqlalchemy.exc import SQLAlchemyError

    from storage.deaths import Cause
    from storage.errors import StorageError

    database = Database(settings.resolved_database_url(), sqlite_synchronous=settings.sqlite_synchronous)
    try:
        _announce(settings, database, release(database, worker_id, cause or Cause.UNKNOWN))
    except (StorageError, SQLAlchemyError, OSError) as error:
        say(f"the work of {worker_id} was not handed on at once, it will be when its leases expire: {error}")
    finally:
        database.close()


def release(database: Database, worker_id: str, cause: Cause) -> Freed:
    """Take everything from a dead worker."""
    from storage import deaths

    with database.begin() as tx:
        return deaths.note_death(tx, worker_id, cause, now=database.now(tx))


def _announce(settings: StorageSettings, database: Database, freed: Freed) -> None:
    if not freed.runs and not freed.num_samples:
        return
    from jobs.app import make_app
    from jobs.dispatch import Dispatcher
    from jobs.settings import JobsSettings

    jobs_settings = JobsSettings(data_dir=settings.data_dir)
    with make_app(jobs_settings) as app:
        dispatcher = Dispatcher(app, database, message_expires_s=jobs_settings.message_expires_s)
        for run in freed.runs:
            dispatcher.announce_run(run)
        if freed.num_samples:
            dispatcher.announce_samples()
