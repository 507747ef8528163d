"""A waiting poll is woken by the outcome, or by the safety read; waiting costs neither threads nor connections."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from jobs import results
from jobs.results import OutcomePublisher, OutcomeSubscription, OutcomeWaiters
from storage import journal
from storage.database import Database
from tests.factories import complete, make_operation, make_run
from tests.servers import ValkeyServer

PATIENCE_S = 60.0


def nothing_finished(_: Sequence[str]) -> Sequence[str]:
    return []


@contextlib.asynccontextmanager
async def reading(waiters: OutcomeWaiters) -> AsyncIterator[None]:
    """Safety reads for the length of the block."""
    task = asyncio.create_task(waiters.safety_reads())
    await asyncio.sleep(0)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextlib.asynccontextmanager
async def listening(url: str, waiters: OutcomeWaiters) -> AsyncIterator[OutcomePublisher]:
    """A publisher, and a subscription that has been seen to receive from it."""
    publisher, subscription = OutcomePublisher(url), OutcomeSubscription(url, waiters.wake_from_thread)
    subscription.start()
    try:
        await until_heard(publisher, waiters)
        yield publisher
    finally:
        subscription.stop()
        await asyncio.to_thread(subscription.join)
        await asyncio.to_thread(publisher.close)


async def until_heard(publisher: OutcomePublisher, waiters: OutcomeWaiters) -> None:
    """Publish a probe until it wakes somebody."""
    async with asyncio.timeout(PATIENCE_S), waiters.subscribed("probe") as heard:
        while not heard.is_set():
            publisher.publish(["probe"])
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(heard.wait(), 0.1)


async def is_woken(event: asyncio.Event) -> bool:
    """Whether a waiter is told before our patience ends."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), PATIENCE_S)
    return event.is_set()


@pytest.mark.servers
def test_an_outcome_wakes_its_waiter_without_a_safety_read(fresh_valkey_url: str) -> None:
    async def scenario() -> None:
        # Given
        waiters = OutcomeWaiters(nothing_finished, safety_read_s=60)
        async with reading(waiters), listening(fresh_valkey_url, waiters) as publisher:
            async with waiters.subscribed("mine") as mine, waiters.subscribed("other") as other:
                # When
                publisher.publish(["mine", "nobody's"])
                await asyncio.wait_for(mine.wait(), PATIENCE_S)
                # Then
                assert not other.is_set()
            assert len(waiters) == 0

    asyncio.run(scenario())


@pytest.mark.servers
def test_every_process_hears_of_every_outcome(fresh_valkey_url: str) -> None:
    async def scenario() -> None:
        # Given
        first, second = (OutcomeWaiters(nothing_finished, safety_read_s=60) for _ in range(2))
        async with (
            reading(first),
            reading(second),
            listening(fresh_valkey_url, first),
            listening(fresh_valkey_url, second) as publisher,
            first.subscribed("r") as here,
            second.subscribed("r") as there,
        ):
            # When
            publisher.publish(["r"])
            # Then
            await asyncio.wait_for(asyncio.gather(here.wait(), there.wait()), PATIENCE_S)

    asyncio.run(scenario())


@pytest.mark.servers
def test_very_many_outcomes_at_once_wake_all_their_waiters(fresh_valkey_url: str) -> None:
    async def scenario() -> None:
        # Given
        waiters = OutcomeWaiters(nothing_finished, safety_read_s=60)
        names = [f"request:{number}" for number in range(1_200)]
        async with (
            reading(waiters),
            listening(fresh_valkey_url, waiters) as publisher,
            contextlib.AsyncExitStack() as stack,
        ):
            events = [await stack.enter_async_context(waiters.subscribed(name)) for name in names]
            # When
            publisher.publish(names)
            # Then
            await asyncio.wait_for(asyncio.gather(*(event.wait() for event in events)), PATIENCE_S)

    asyncio.run(scenario())


@pytest.mark.servers
def test_a_broker_that_comes_back_is_used_again() -> None:
    async def scenario(server: ValkeyServer) -> None:
        # Given
        waiters = OutcomeWaiters(nothing_finished, safety_read_s=60)
        async with reading(waiters), listening(server.url, waiters) as publisher:
            # When all connections are cut
            assert publisher._connection is not None
            publisher._connection.default_channel.client.execute_command(
                "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "no"
            )
            # Then
            await until_heard(publisher, waiters)

    server = ValkeyServer()
    try:
        asyncio.run(scenario(server))
    finally:
        server.close()


class StuckBroker:
    """Stands in for kombu's producer: keeps whoever publishes waiting until told to go on."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.goes_on = threading.Event()
        self.published: list[str] = []

    def publish(self, body: dict[str, list[str]]) -> None:
        self.reached.set()
        assert self.goes_on.wait(PATIENCE_S)
        self.published.extend(body["request_ids"])


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> StuckBroker:
    """What every publisher connects to."""
    broker = StuckBroker()
    monkeypatch.setattr(OutcomePublisher, "_connect", lambda _: broker)
    return broker


def test_a_broker_that_blocks_delays_nobody_who_publishes(stuck: StuckBroker) -> None:
    # Given
    publisher = OutcomePublisher("redis://127.0.0.1:1/0")
    publisher.publish(["first"])
    assert stuck.reached.wait(PATIENCE_S)
    # When it returns while the broker still blocks
    publisher.publish(["second"])
    assert stuck.published == []
    # Then
    stuck.goes_on.set()
    publisher.close()
    assert stuck.published == ["first", "second"]


def test_of_more_outcomes_than_may_wait_the_oldest_are_dropped(
    stuck: StuckBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given
    monkeypatch.setattr(results, "QUEUED_MAX", 3)
    publisher = OutcomePublisher("redis://127.0.0.1:1/0")
    publisher.publish(["sent"])
    assert stuck.reached.wait(PATIENCE_S)
    # When
    publisher.publish(["a", "b", "c"])
    publisher.publish(["d"])
    stuck.goes_on.set()
    publisher.close()
    # Then
    assert stuck.published == ["sent", "b", "c", "d"]


def test_closing_does_not_wait_for_a_broker_that_blocks(stuck: StuckBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given
    monkeypatch.setattr(results, "CLOSE_S", 0.01)
    publisher = OutcomePublisher("redis://127.0.0.1:1/0")
    publisher.publish(["r"])
    assert stuck.reached.wait(PATIENCE_S)
    # When
    publisher.close()
    # Then
    assert stuck.published == []
    stuck.goes_on.set()


def test_a_publisher_that_had_nothing_to_say_closes_without_having_begun_a_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Given
    monkeypatch.setattr(threading.Thread, "start", lambda thread: pytest.fail(f"began {thread.name}"))
    publisher = OutcomePublisher("redis://127.0.0.1:1/0")
    # When
    publisher.publish([])
    # Then
    publisher.close()


def test_outcomes_of_a_moment_without_threads_are_published_with_the_next(
    stuck: StuckBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    stuck.goes_on.set()
    publisher = OutcomePublisher("redis://127.0.0.1:1/0")
    with monkeypatch.context() as starved:
        starved.setattr(threading.Thread, "start", refuse)
        publisher.publish(["first"])
    # When
    publisher.publish(["second"])
    publisher.close()
    # Then
    assert stuck.published == ["first", "second"]


def test_a_broker_that_is_away_is_tried_again_with_the_next_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given
    tried = threading.Semaphore(0)

    def refuse(_: OutcomePublisher) -> None:
        tried.release()
        raise ConnectionRefusedError

    monkeypatch.setattr(OutcomePublisher, "_connect", refuse)
    publisher = OutcomePublisher("redis://127.0.0.1:1/0")
    for _ in range(2):
        # When
        publisher.publish(["r"])
        # Then
        assert tried.acquire(timeout=PATIENCE_S)
    publisher.close()


def test_a_lost_notification_is_covered_by_the_safety_read(database: Database) -> None:
    # Given
    with database.begin() as tx:
        operation = make_operation(tx, make_run(tx))

    def find_finished(request_ids: Sequence[str]) -> Sequence[str]:
        with database.read() as tx:
            return journal.finished_among(tx, request_ids)

    async def scenario() -> None:
        waiters = OutcomeWaiters(find_finished, safety_read_s=0.05)
        async with reading(waiters), waiters.subscribed(operation.request_id) as event:
            assert not event.is_set()
            # When
            with database.begin() as tx:
                complete(tx, operation)
            # Then
            assert await is_woken(event)

    asyncio.run(scenario())


def test_a_database_that_is_away_for_a_while_does_not_end_the_safety_reads() -> None:
    async def scenario() -> None:
        # Given
        answers = iter([ConnectionError("away"), ConnectionError("away"), ["r"]])

        def find_finished(_: Sequence[str]) -> Sequence[str]:
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            return answer

        waiters = OutcomeWaiters(find_finished, safety_read_s=0.05)
        # When
        async with reading(waiters), waiters.subscribed("r") as event:
            # Then
            await asyncio.wait_for(event.wait(), PATIENCE_S)

    asyncio.run(scenario())


def test_a_thousand_waiters_hold_no_thread_and_no_connection(database: Database) -> None:
    # Given
    with database.begin() as tx:
        run = make_run(tx)
        operations = [make_operation(tx, run, seq) for seq in range(20)]
    read_twice = threading.Semaphore(0)

    def find_finished(request_ids: Sequence[str]) -> Sequence[str]:
        with database.read() as tx:
            finished = journal.finished_among(tx, request_ids)
        read_twice.release()
        return finished

    async def scenario() -> None:
        waiters = OutcomeWaiters(find_finished, safety_read_s=0.05)

        async def wait(request_id: str) -> None:
            async with waiters.subscribed(request_id) as event:
                await event.wait()

        async with reading(waiters):
            await asyncio.to_thread(lambda: None)  # the one thread that the safety reads go through
            threads_before = threading.active_count()
            polls = [asyncio.create_task(wait(f"{run.id}:{seq}")) for seq in range(1_000)]
            await asyncio.sleep(0)
            assert len(waiters) == 1_000
            # When they have been looked up in vain
            for _ in range(2):
                await asyncio.to_thread(read_twice.acquire)
            # Then
            assert threading.active_count() <= threads_before + 4  # a pool may start one before another is idle again
            assert database.engine.pool.checkedout() <= 1  # type: ignore[attr-defined]
            # When
            with database.begin() as tx:
                for operation in operations:
                    complete(tx, operation)
            # Then
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.gather(*polls[: len(operations)])
            assert len(waiters) == 1_000 - len(operations)
            for poll in polls:
                poll.cancel()
            await asyncio.gather(*polls, return_exceptions=True)
            assert len(waiters) == 0

    asyncio.run(scenario())
    assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_whoever_waits_when_the_process_ends_is_let_go() -> None:
    async def scenario() -> None:
        # Given
        waiters = OutcomeWaiters(nothing_finished, safety_read_s=60)
        async with reading(waiters), waiters.subscribed("r") as event:
            # When
            await asyncio.to_thread(waiters.end)
            # Then
            await asyncio.wait_for(event.wait(), PATIENCE_S)
        async with waiters.subscribed("late") as late:
            assert late.is_set()

    asyncio.run(scenario())


def test_two_that_wait_for_one_id_are_both_woken_and_one_that_left_is_forgotten() -> None:
    async def scenario() -> None:
        # Given
        waiters = OutcomeWaiters(nothing_finished, safety_read_s=60)
        async with waiters.subscribed("r") as first:
            async with waiters.subscribed("r"):
                pass
            async with waiters.subscribed("r") as second:
                # When
                waiters.wake(["r", "unknown"])
                # Then
                assert first.is_set()
                assert second.is_set()
            assert len(waiters) == 1
        assert len(waiters) == 0

    asyncio.run(scenario())


def test_a_wake_up_before_or_after_the_loop_is_no_error() -> None:
    # Given
    waiters = OutcomeWaiters(nothing_finished, safety_read_s=60)
    wake: Callable[[Sequence[str]], None] = waiters.wake_from_thread
    # Then
    wake(["r"])

    async def scenario() -> None:
        async with reading(waiters):
            pass

    asyncio.run(scenario())
    wake(["r"])
