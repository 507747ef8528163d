"""Of several schedulers one leads; when it is gone another does."""

import threading
from collections.abc import Iterator
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from apscheduler.job import Job
from apscheduler.schedulers.background import BackgroundScheduler
from sqlalchemy.exc import OperationalError

from jobs import billing_jobs, scheduler
from jobs.scheduler import leadership
from jobs.settings import JobsSettings
from storage.open import Storage, open_storage
from storage.settings import StorageSettings
from tests.factories import NOW


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.servers)])
def two(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Storage, Storage]]:
    """Storage as two processes have it."""
    url = "" if request.param == "sqlite" else request.getfixturevalue("fresh_database_url")
    settings = StorageSettings(data_dir=tmp_path, database_url=url, object_store_url="")
    opened = (open_storage(settings), open_storage(settings))
    yield opened
    for storage in opened:
        storage.close()


def test_one_leads_at_a_time_and_hands_on(two: tuple[Storage, Storage], tmp_path: Path) -> None:
    first, second = two
    # When
    with leadership(first, tmp_path) as leads, leadership(second, tmp_path) as waits:
        # Then
        assert leads is not None
        assert leads.is_set()
        assert waits is None
    # When
    with leadership(second, tmp_path) as leads, leadership(first, tmp_path) as waits:
        # Then
        assert leads is not None
        assert waits is None
    assert first.database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_a_leader_that_fails_lets_go(two: tuple[Storage, Storage], tmp_path: Path) -> None:
    first, second = two
    # When
    with pytest.raises(ZeroDivisionError), leadership(first, tmp_path):
        raise ZeroDivisionError
    # Then
    with leadership(second, tmp_path) as leads:
        assert leads is not None


def test_a_database_that_is_away_ends_no_scheduler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Given: it comes back at the third look
    looks: list[int] = []

    def lead(_storage: Storage, _settings: JobsSettings, stopping: threading.Event) -> None:
        looks.append(1)
        if len(looks) < 3:
            raise OperationalError("SELECT 1", {}, Exception("the database system is starting up"))
        stopping.set()

    monkeypatch.setenv("PIECEWORK_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(scheduler, "lead", lead)
    monkeypatch.setattr(scheduler, "LEADER_RETRY_S", 0.001)
    monkeypatch.setattr(scheduler, "set_up_logging", lambda _: None)
    monkeypatch.setattr("jobs.scheduler.signal.signal", lambda *_: None)
    # When: this returns
    scheduler.main()
    # Then
    assert len(looks) == 3


def test_a_database_that_is_away_is_said_to_be(tmp_path: Path) -> None:
    url = "postgresql+psycopg://piecework:secret@127.0.0.1:1/none"
    storage = open_storage(StorageSettings(data_dir=tmp_path, database_url=url, object_store_url=""))
    with pytest.raises(OperationalError):
        scheduler.lead(storage, JobsSettings(data_dir=tmp_path), threading.Event())
    storage.close()


def test_a_scheduler_that_is_restarted_often_fires_hourly_jobs_too() -> None:
    # Given schedulers that lead for a quarter of an hour each
    leads = timedelta(minutes=15)
    fired: dict[str, list[datetime]] = {name: [] for name in EVERY}
    for number in range(4):
        # When
        for name, moments in fire_times(NOW + number * leads, leads).items():
            fired[name] += moments
    # Then
    assert all(len(moments) >= 4 for moments in fired.values())


def test_what_is_fired_first_is_spread_and_never_later_than_its_interval() -> None:
    # When
    fired = fire_times(NOW, timedelta(hours=3))
    # Then: first soon, in the order of their intervals, each at a moment of its own
    firsts = {name: moments[0] - NOW for name, moments in fired.items()}
    assert len(set(firsts.values())) == len(firsts)
    assert sorted(firsts, key=lambda name: firsts[name]) == sorted(EVERY, key=lambda name: EVERY[name])
    assert all(first <= min(EVERY[name], timedelta(minutes=1)) for name, first in firsts.items())
    # And: then at their intervals
    for name, moments in fired.items():
        assert {later - earlier for earlier, later in pairwise(moments)} == {EVERY[name]}


EVERY = {"sweep": timedelta(seconds=2), **{name: job.every for name, job in billing_jobs.JOBS.items()}}


def fire_times(start: datetime, lasts: timedelta) -> dict[str, list[datetime]]:
    """When a scheduler that begins to lead at this moment fires what, as long as it leads."""
    jobs = BackgroundScheduler(timezone="UTC")
    scheduler.add_jobs(jobs, [scheduler.Timed(name, every, print) for name, every in EVERY.items()], now=start)
    jobs.start(paused=True)
    fired = {job.id: list(_moments(job, start + lasts)) for job in jobs.get_jobs()}
    jobs.shutdown()
    return fired


def _moments(job: Job, end: datetime) -> Iterator[datetime]:
    moment = job.next_run_time
    while moment < end:
        yield moment
        moment = job.trigger.get_next_fire_time(moment, moment)
