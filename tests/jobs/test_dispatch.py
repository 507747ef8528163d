"""Work is announced to the worker that holds the run, else to any; a broker that is away delays it and no more."""

import threading
from collections.abc import Callable
from datetime import timedelta

import pytest
from celery import Celery

from jobs.app import WORK_QUEUE, make_app, worker_queue_name
from jobs.dispatch import WARM_EXPIRES_S, Dispatcher
from jobs.settings import JobsSettings
from storage import leases
from storage.clock import FrozenClock
from storage.database import Database
from tests.factories import make_run

PATIENCE_S = 60.0


class SentMessages:
    """Stands in for the Celery app: remembers what was sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, object, float]] = []

    def send_task(self, name: str, *, kwargs: object, routing_key: str, expiration: float, **_: object) -> None:
        self.sent.append((name, routing_key, kwargs, expiration))


@pytest.fixture
def messages() -> SentMessages:
    return SentMessages()


@pytest.fixture
def dispatcher(messages: SentMessages, database: Database) -> Dispatcher:
    return Dispatcher(messages, database, message_expires_s=60)  # type: ignore[arg-type]


def test_a_run_that_nobody_holds_is_announced_to_all(
    dispatcher: Dispatcher, messages: SentMessages, database: Database, clock: FrozenClock
) -> None:
    # Given
    with database.begin() as tx:
        run = make_run(tx)
    # When
    dispatcher.announce_run(run.id)
    # Then
    expires_at = (clock.now() + timedelta(seconds=60)).isoformat()
    arguments = {"run_id": run.id, "expires_at": expires_at, "version": 1}
    assert messages.sent == [("piecework.advance_run", WORK_QUEUE, arguments, 60)]


def test_a_held_run_is_announced_to_its_worker_until_the_lease_expires(
    dispatcher: Dispatcher, messages: SentMessages, database: Database, clock: FrozenClock
) -> None:
    # Given
    with database.begin() as tx:
        run = make_run(tx)
        expires_at = clock.now() + timedelta(seconds=10)
        leases.acquire(tx, run.id, worker_id="warm", now=clock.now(), expires_at=expires_at)
    # When
    dispatcher.announce_run(run.id)
    clock.advance(11)
    dispatcher.announce_run(run.id)
    # Then
    assert [(queue, expires) for _, queue, _, expires in messages.sent] == [
        (worker_queue_name("warm"), WARM_EXPIRES_S),
        (WORK_QUEUE, 60),
    ]


def test_samples_sweeps_and_jobs_of_the_bill_are_announced_to_all(
    dispatcher: Dispatcher, messages: SentMessages
) -> None:
    # When
    dispatcher.announce_samples()
    dispatcher.announce_sweep()
    dispatcher.announce_billing("roll_up")
    # Then
    assert [(name, queue) for name, queue, _, _ in messages.sent] == [
        ("piecework.draw_samples", WORK_QUEUE),
        ("piecework.sweep_objects", WORK_QUEUE),
        ("piecework.run_billing_job", WORK_QUEUE),
    ]


@pytest.mark.parametrize(
    "broker_url",
    ["redis://127.0.0.1:1/0", "amqp://guest:guest@127.0.0.1:1//", "redis+socket:///nonexistent/broker.sock"],
)
def test_a_broker_that_is_away_neither_fails_nor_hangs_the_caller(broker_url: str, database: Database) -> None:
    # Given
    with database.begin() as tx:
        run = make_run(tx)
    app = make_app(JobsSettings(broker_url=broker_url))
    dispatcher = Dispatcher(app, database, message_expires_s=60)
    # When
    outcome = in_time(lambda: dispatcher.announce_run(run.id))
    # Then
    assert outcome is None
    app.close()


def in_time(call: Callable[[], None]) -> BaseException | None:
    """What the call raised; fails if it does not end."""
    raised: list[BaseException] = []
    ended = threading.Event()

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)
        ended.set()

    threading.Thread(target=run, daemon=True).start()
    assert ended.wait(PATIENCE_S), "the caller hangs"
    return raised[0] if raised else None


@pytest.mark.servers
def test_a_message_reaches_its_queue_with_identifiers_alone(
    fresh_valkey_url: str, database: Database, clock: FrozenClock
) -> None:
    # Given
    with database.begin() as tx:
        run = make_run(tx)
    app: Celery = make_app(JobsSettings(broker_url=fresh_valkey_url))
    # When
    Dispatcher(app, database, message_expires_s=60).announce_run(run.id)
    # Then
    with app.connection_for_read() as connection, connection.SimpleQueue(WORK_QUEUE) as queue:
        message = queue.get(timeout=PATIENCE_S)
        message.ack()
        assert message.content_type == "application/json"
        assert message.headers["task"] == "piecework.advance_run"
        expires_at = (clock.now() + timedelta(seconds=60)).isoformat()
        assert message.payload[1] == {"run_id": run.id, "expires_at": expires_at, "version": 1}
        assert message.headers["expires"] is None  # the taker's clock decides nothing
    app.close()
