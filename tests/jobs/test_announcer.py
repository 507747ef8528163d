"""No broker makes a submission wait: what cannot be announced now is announced later, once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest
import redis

from jobs import announcer as announcers
from jobs.announcer import Announcer
from jobs.app import make_app
from jobs.dispatch import Dispatcher
from jobs.settings import JobsSettings
from storage.database import Database
from storage.errors import DatabaseUnavailableError
from tests.factories import make_run
from tests.servers import ValkeyServer

PATIENCE_S = 60.0


class Broker:
    """In the dispatcher's place: a broker that can be away, or not answer."""

    def __init__(self) -> None:
        self.announced: list[str] = []
        self.refuses = 0
        self.error: Exception | None = None
        self.answers = threading.Event()
        self.answers.set()
        self.asked = threading.Semaphore(0)

    def announce_run(self, run_id: str) -> bool:
        self.asked.release()
        assert self.answers.wait(PATIENCE_S)
        if self.error is not None:
            raise self.error
        if self.refuses:
            self.refuses -= 1
            return False
        self.announced.append(run_id)
        return True

    def announce_samples(self) -> bool:
        return self.announce_run("samples")


@pytest.fixture
def broker() -> Broker:
    return Broker()


@pytest.fixture
def announcer(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> Iterator[Announcer]:
    monkeypatch.setattr(announcers, "RETRY_FIRST_S", 0.001)
    made = Announcer(broker)
    yield made
    broker.answers.set()
    made.close()


def test_everything_is_announced_in_order(broker: Broker, announcer: Announcer) -> None:
    announcer.announce_run("a")
    announcer.announce_samples()
    announcer.announce_run("b")
    announcer.close()
    assert broker.announced == ["a", "samples", "b"]
    assert announcer.trouble is None


def test_a_broker_that_does_not_answer_makes_nobody_wait_and_hears_of_each_run_once(
    broker: Broker, announcer: Announcer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given: one announcement hangs in the broker
    monkeypatch.setattr(announcers, "SLOW_S", 0.0)
    broker.answers.clear()
    announcer.announce_run("first")
    assert broker.asked.acquire(timeout=PATIENCE_S)
    # when: this returns
    for _ in range(100):
        announcer.announce_run("a")
        announcer.announce_samples()
    # then
    assert "has not taken a message" in str(announcer.trouble)
    broker.answers.set()
    announcer.close()
    assert broker.announced == ["first", "a", "samples"]


def test_what_happens_to_a_run_while_it_is_announced_is_announced_again(broker: Broker, announcer: Announcer) -> None:
    broker.answers.clear()
    announcer.announce_run("a")
    assert broker.asked.acquire(timeout=PATIENCE_S)
    announcer.announce_run("a")
    broker.answers.set()
    announcer.close()
    assert broker.announced == ["a", "a"]


def test_a_broker_that_is_away_is_asked_again_until_it_is_back(broker: Broker, announcer: Announcer) -> None:
    # given
    broker.refuses = 3
    announcer.announce_run("a")
    # when
    for _ in range(4):
        assert broker.asked.acquire(timeout=PATIENCE_S)
    announcer.close()
    # then
    assert broker.announced == ["a"]
    assert announcer.trouble is None


def test_a_database_that_is_away_ends_no_thread(broker: Broker, announcer: Announcer) -> None:
    # given: whose lease it is cannot be looked up
    broker.error = DatabaseUnavailableError("sqlite://", "away")
    announcer.announce_run("a")
    assert broker.asked.acquire(timeout=PATIENCE_S)
    assert broker.asked.acquire(timeout=PATIENCE_S)
    assert "has refused" in str(announcer.trouble)
    # when
    broker.error = None
    assert broker.asked.acquire(timeout=PATIENCE_S)
    announcer.close()
    # then
    assert "a" in broker.announced


def test_what_waits_is_bounded_and_the_oldest_is_left_to_the_sweeper(
    broker: Broker, announcer: Announcer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcers, "WAITING_MAX", 3)
    broker.answers.clear()
    announcer.announce_run("first")
    assert broker.asked.acquire(timeout=PATIENCE_S)
    for name in "abcde":
        announcer.announce_run(name)
    broker.answers.set()
    announcer.close()
    assert broker.announced == ["first", "c", "d", "e"]


@pytest.mark.servers
def test_a_stopped_broker_gets_what_was_announced_once_it_goes_on(database: Database) -> None:
    # given: a broker that takes connections and says nothing
    server = ValkeyServer()
    app = make_app(JobsSettings(broker_url=server.url))
    with database.begin() as tx:
        run = make_run(tx)
    announcer = Announcer(Dispatcher(app, database, message_expires_s=60))
    with redis.Redis.from_url(server.url) as admin:
        pid = int(admin.info()["process_id"])
    os.kill(pid, signal.SIGSTOP)
    try:
        # when: this returns, whatever the broker does
        announcer.announce_run(run.id)
        announcer.announce_samples()
    finally:
        os.kill(pid, signal.SIGCONT)
    # then
    with app.connection_for_read() as connection, connection.SimpleQueue("piecework.work") as queue:
        tasks = [queue.get(timeout=PATIENCE_S).headers["task"] for _ in range(2)]
    assert tasks == ["piecework.advance_run", "piecework.draw_samples"]
    announcer.close()
    app.close()
    server.close()
