"""`python -m jobs.scheduler`: says when, and makes one call each. Of several schedulers one leads, the others wait."""

from __future__ import annotations

import contextlib
import fcntl
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import structlog
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.schedulers.base import BaseScheduler
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from jobs import billing_jobs, sweeper
from jobs.announcer import Announcer
from jobs.app import make_app
from jobs.dispatch import Dispatcher
from jobs.reminders import Reminders
from jobs.results import OutcomePublisher
from jobs.settings import JobsSettings
from storage.clock import SystemClock
from storage.open import Storage, open_storage
from storage.telemetry import set_up_logging

log = structlog.get_logger()

LEADER_LOCK = 7_263_511_902  # any number, as long as only schedulers use it
LEADER_RETRY_S = 1.0
FIRST_AFTER = timedelta(seconds=5)
APART = timedelta(seconds=5)
"""Jobs that a scheduler begins with are fired so far from each other: longer than a worker's task takes."""


@dataclass(frozen=True)
class Timed:
    """What is done on a clock.

    Attributes:
        every: how often.
    """

    name: str
    every: timedelta
    call: Callable[..., object]
    arguments: Sequence[object] = ()


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    set_up_logging("scheduler")
    stopping = threading.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, lambda *_: stopping.set())
    settings = JobsSettings()
    storage = open_storage()
    while not stopping.is_set():
        try:
            lead(storage, settings, stopping)
        except SQLAlchemyError as error:  # it leads again when the database is back
            log.warning("storage_unavailable", error=str(error))
        stopping.wait(LEADER_RETRY_S * random.uniform(0.5, 1.0))  # noqa: S311
    storage.close()


def lead(storage: Storage, settings: JobsSettings, stopping: threading.Event) -> None:
    """Do what the scheduler does, as long as no other leads and the lock stands.

    Raises:
        SQLAlchemyError: the database cannot be asked who leads.
    """
    with leadership(storage, settings.data_dir) as leads:
        if leads is not None:
            log.info("scheduler_leads")
            _run_jobs(storage, settings, stopping, leads)


def _run_jobs(storage: Storage, settings: JobsSettings, stopping: threading.Event, leads: threading.Event) -> None:
    app = make_app(settings)
    dispatcher = Dispatcher(app, storage.database, message_expires_s=settings.message_expires_s)
    announcer = Announcer(dispatcher)  # a broker that does not answer keeps no gap open and no claim held
    publisher = OutcomePublisher(settings.resolved_broker_url())
    reminders = Reminders(first_s=settings.sweep_s, longest_s=settings.message_expires_s)
    sweep = (storage.database, announcer, publisher.publish, settings, reminders)
    timed = [
        Timed("sweep", timedelta(seconds=settings.sweep_s), sweeper.sweep, sweep),
        Timed("sweep_objects", timedelta(seconds=settings.object_sweep_s), dispatcher.announce_sweep),
        *(Timed(name, job.every, dispatcher.announce_billing, [name]) for name, job in billing_jobs.JOBS.items()),
    ]
    scheduler = BackgroundScheduler(timezone="UTC")
    add_jobs(scheduler, timed, now=SystemClock().now())  # by which APScheduler fires; it decides nothing else
    scheduler.start()
    while not stopping.wait(LEADER_RETRY_S) and leads.is_set():
        pass
    scheduler.shutdown(wait=True)
    announcer.close()
    publisher.close()
    app.close()


def add_jobs(scheduler: BaseScheduler, timed: Sequence[Timed], *, now: datetime) -> None:
    """Have each fired soon, one after the other, and from then on at its interval, however late a moment is noticed.

    What is done more often is fired earlier, and nothing later than an interval from now: a scheduler that leads for
    less than an hour has fired what is done hourly, too.
    """
    for place, job in enumerate(sorted(timed, key=lambda job: job.every)):
        scheduler.add_job(
            job.call,
            "interval",
            seconds=job.every.total_seconds(),
            args=list(job.arguments),
            id=job.name,
            next_run_time=now + min(job.every, FIRST_AFTER + place * APART),
            coalesce=True,
            max_instances=1,
            misfire_grace_time=None,
        )


@contextlib.contextmanager
def leadership(storage: Storage, data_dir: Path) -> Iterator[threading.Event | None]:
    """The leader's lock for the length of the block, or None while another scheduler holds it.

    On SQLite a file lock, on PostgreSQL an advisory lock: both end with the process. The event is cleared when the
    lock's connection is lost.
    """
    if storage.database.is_sqlite:
        with _file_leadership(data_dir / "scheduler.lock") as leads:
            yield leads
    else:
        with _postgres_leadership(storage) as leads:
            yield leads


@contextlib.contextmanager
def _file_leadership(path: Path) -> Iterator[threading.Event | None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        leads = threading.Event()
        leads.set()
        yield leads


@contextlib.contextmanager
def _postgres_leadership(storage: Storage) -> Iterator[threading.Event | None]:
    with storage.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if not connection.execute(text("SELECT pg_try_advisory_lock(:lock)"), {"lock": LEADER_LOCK}).scalar_one():
            yield None
            return
        leads = threading.Event()
        leads.set()
        done = threading.Event()

        def watch() -> None:
            while not done.wait(LEADER_RETRY_S):
                try:
                    connection.execute(text("SELECT 1"))
                except Exception as error:  # whatever it is, the lock is gone with the connection
                    log.warning("leadership_lost", error=str(error))
                    leads.clear()
                    return

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield leads
        finally:
            done.set()
            watcher.join()
            if leads.is_set():
                connection.execute(text("SELECT pg_advisory_unlock(:lock)"), {"lock": LEADER_LOCK})


if __name__ == "__main__":
    main()
