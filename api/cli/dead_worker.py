"""What the supervisor knows before any timeout: this worker is dead. Its runs go on at once instead of at expiry."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from storage.database import Database
from storage.settings import StorageSettings


def free_worker(settings: StorageSettings, worker_id: str, say: Callable[[str], None]) -> None:
    """Free the leases and claims of a dead worker and announce its work.

    Nothing depends on it: where database or broker cannot be reached now, leases expire and the scheduler announces.
    """
    from sqlalchemy.exc import SQLAlchemyError

    from storage.errors import StorageError

    database = Database(settings.resolved_database_url(), sqlite_synchronous=settings.sqlite_synchronous)
    try:
        _announce(settings, database, *release(database, worker_id))
    except (StorageError, SQLAlchemyError, OSError) as error:
        say(f"the work of {worker_id} was not handed on at once, it will be when its leases expire: {error}")
    finally:
        database.close()


def release(database: Database, worker_id: str) -> tuple[Sequence[str], int]:
    """Take everything from a dead worker; returns its runs and how many samples it had claimed."""
    from storage import journal, leases, workers

    with database.begin() as tx:
        now = database.now(tx)
        runs = leases.release_worker(tx, worker_id)
        num_samples = journal.release_claims(tx, now=now, worker_id=worker_id)
        workers.record_stopped(tx, worker_id, now=now)
    return runs, num_samples


def _announce(settings: StorageSettings, database: Database, runs: Sequence[str], num_samples: int) -> None:
    if not runs and not num_samples:
        return
    from jobs.app import make_app
    from jobs.dispatch import Dispatcher
    from jobs.settings import JobsSettings

    jobs_settings = JobsSettings(data_dir=settings.data_dir)
    with make_app(jobs_settings) as app:
        dispatcher = Dispatcher(app, database, message_expires_s=jobs_settings.message_expires_s)
        for run in runs:
            dispatcher.announce_run(run)
        if num_samples:
            dispatcher.announce_samples()
