"""Finds the outcome of a request id the moment it is there.

Workers publish the ids of finished operations to a fan-out exchange; each api process has one subscription and wakes
those who wait, in memory. Subscribe, read the row, wait: so no wake-up can be missed. A safety read of all waiting ids
covers a lost notification. A waiting poll holds no thread and no database connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import structlog
from kombu import Connection, Consumer, Producer, Queue

from jobs.app import OUTCOMES, transport_options
from jobs.thread_on_demand import ThreadOnDemand

log = structlog.get_logger()

RECONNECT_S = 0.5
IDS_PER_MESSAGE = 500
QUEUED_MAX = 20_000
CLOSE_S = 2.0


class OutcomePublisher:
    """Tells every api process which operations have an outcome, from a thread of its own.

    A broker that is away, or that blocks those who publish, delays nobody: at most `QUEUED_MAX` ids wait for it, of
    more the oldest are dropped, and their waiters find the outcome by their safety read.
    """

    def __init__(self, broker_url: str) -> None:
        self._broker_url = broker_url
        self._waiting: deque[str] = deque(maxlen=QUEUED_MAX)
        self._thread = ThreadOnDemand(self._run, name="publisher")
        self._connection: Connection | None = None
        self._producer: Producer | None = None

    def publish(self, request_ids: Sequence[str]) -> None:
        """Have outcomes announced; returns at once."""
        if not request_ids:
            return
        with self._thread.changed:
            self._waiting.extend(request_ids)
            self._thread.wake()

    def close(self) -> None:
        """Announce what waits, unless that takes long, and close the connection."""
        self._thread.close(timeout_s=CLOSE_S)

    def _run(self) -> None:
        while request_ids := self._next():
            try:
                producer = self._producer or self._connect()
                producer.publish({"request_ids": request_ids})
            except Exception as error:  # the broker's libraries raise what they like; what is published is a hint only
                self._disconnect()
                log.warning("outcome_notification_failed", error=str(error))
        self._disconnect()

    def _next(self) -> list[str]:
        """Wait for ids to announce; none when closing and all are."""
        with self._thread.changed:
            self._thread.wait_for(lambda: self._waiting)
            return [self._waiting.popleft() for _ in range(min(len(self._waiting), IDS_PER_MESSAGE))]

    def _connect(self) -> Producer:
        options = transport_options(self._broker_url)
        self._connection = Connection(self._broker_url, transport_options=options, connect_timeout=4)
        self._producer = Producer(self._connection.channel(), exchange=OUTCOMES, serializer="json")
        self._producer.declare()
        return self._producer

    def _disconnect(self) -> None:
        connection, self._connection, self._producer = self._connection, None, None
        with contextlib.suppress(Exception):
            if connection is not None:
                connection.close()


class OutcomeSubscription(threading.Thread):
    """The one subscription of an api process: a thread that hands request ids on."""

    def __init__(self, broker_url: str, on_outcomes: Callable[[Sequence[str]], None]) -> None:
        super().__init__(name="outcomes", daemon=True)
        self._broker_url = broker_url
        self._on_outcomes = on_outcomes
        self._stopping = threading.Event()
        self._is_connected = False

    def run(self) -> None:
        """Consume until stopped; reconnect whenever the broker comes back."""
        while not self._stopping.is_set():
            try:
                self._consume()
            except Exception as error:  # the broker's libraries raise what they like; the safety read goes on meanwhile
                log.warning("outcome_subscription_lost", error=str(error))
                self._is_connected = False
                self._stopping.wait(RECONNECT_S)

    @property
    def trouble(self) -> str | None:
        """What is wrong with the broker, as far as listening has shown."""
        return None if self._is_connected else "is not connected"

    def stop(self) -> None:
        """End the thread within a second."""
        self._stopping.set()

    def _consume(self) -> None:
        options = transport_options(self._broker_url)
        with Connection(self._broker_url, transport_options=options, connect_timeout=4) as connection:
            queue = Queue("", exchange=OUTCOMES, exclusive=True, auto_delete=True, durable=False)
            with Consumer(connection.channel(), queues=[queue], callbacks=[self._receive], no_ack=True):
                self._is_connected = True
                while not self._stopping.is_set():
                    with contextlib.suppress(TimeoutError):
                        connection.drain_events(timeout=1.0)

    def _receive(self, body: Any, _message: Any) -> None:
        self._on_outcomes(body["request_ids"])


class OutcomeWaiters:
    """Those who wait in this api process, by request id.

    Args:
        find_finished: which of these ids have an outcome; called about once a second, in a thread.
        safety_read_s: how often.
    """

    def __init__(self, find_finished: Callable[[Sequence[str]], Sequence[str]], *, safety_read_s: float) -> None:
        self._find_finished = find_finished
        self._safety_read_s = safety_read_s
        self._events: dict[str, set[asyncio.Event]] = defaultdict(set)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = False

    def __len__(self) -> int:
        """How many ids are waited for."""
        return len(self._events)

    @contextlib.asynccontextmanager
    async def subscribed(self, request_id: str) -> AsyncIterator[asyncio.Event]:
        """An event that is set once the operation has an outcome; read the row after entering and before waiting."""
        event = asyncio.Event()
        if self._ended:
            event.set()
        self._events[request_id].add(event)
        try:
            yield event
        finally:
            waiting = self._events[request_id]
            waiting.discard(event)
            if not waiting:
                del self._events[request_id]

    def wake(self, request_ids: Sequence[str]) -> None:
        """Wake those who wait for these ids; called in the event loop."""
        for request_id in request_ids:
            for event in self._events.get(request_id, ()):
                event.set()

    def wake_from_thread(self, request_ids: Sequence[str]) -> None:
        """The same, from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.wake, request_ids)

    def end(self) -> None:
        """Let everyone go who waits or is going to, since the process is about to end; called from any thread."""
        self._ended = True
        self.wake_from_thread(list(self._events))

    async def safety_reads(self) -> None:
        """Look all waiting ids up, again and again; run this as a task of the event loop."""
        self._loop = asyncio.get_running_loop()
        while True:
            started = time.monotonic()
            if self._events:
                try:
                    self.wake(await asyncio.to_thread(self._find_finished, list(self._events)))
                except Exception as error:  # a database that is away must not end the loop
                    log.warning("safety_read_failed", error=str(error))
            await asyncio.sleep(max(0.05, self._safety_read_s - (time.monotonic() - started)))
