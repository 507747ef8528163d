"""What is wrong at the moment: database, object store and broker, each asked in a thread of its own.

A service that hangs makes nobody wait: after `ANSWER_S`, or `STORE_ANSWER_S` for the object store, it counts as slow.
What went wrong in answering requests is remembered for a while too, since a full disk still answers who only reads.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from jobs.announcer import Announcer
from jobs.results import OutcomeSubscription
from storage import base_models
from storage.errors import DatabaseUnavailableError, StorageError
from storage.open import Storage

log = structlog.get_logger()

OK = "ok"
FRESH_S = 2.0
ANSWER_S = 2.0
STORE_ANSWER_S = 0.5
"""Less than a supervisor waits for an answer: without the store rows are accepted all the same."""
REMEMBERED_S = 15.0
LOOK_S = 0.01
FULL = ("is full", "no space left", "disk full", "quota", "insufficient")


@dataclass(frozen=True)
class Report:
    """What there is, each with `ok`, `slow`, `full`, `unavailable`, or in words.

    Attributes:
        accepting: whether rows can be read, without which nothing is answered.
    """

    accepting: bool
    states: dict[str, str] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """All in a word."""
        if not self.accepting:
            return "unavailable"
        return OK if set(self.states.values()) == {OK} else "degraded"


class Health:
    """Asks, and remembers what failed."""

    def __init__(self, storage: Storage, broker_trouble: Callable[[], str | None] = lambda: None) -> None:
        def read() -> None:
            with storage.database.read() as tx:
                base_models.list_base_models(tx)

        self._database = Probe(read)
        self._object_store = Probe(storage.objects.check)
        self._broker_trouble = broker_trouble
        self._failed: dict[str, tuple[float, str]] = {}

    def note(self, error: StorageError) -> None:
        """Remember that answering a request has failed for this reason."""
        what = "database" if isinstance(error, DatabaseUnavailableError) else "object_store"
        self._failed[what] = (time.monotonic(), in_a_word(error))

    async def report(self) -> Report:
        """How things are; takes no longer than `ANSWER_S`."""
        probes = {"database": self._database, "object_store": self._object_store}
        for probe in probes.values():
            probe.begin()
        begun = time.monotonic()
        for probe, patience_s in ((self._object_store, STORE_ANSWER_S), (self._database, ANSWER_S)):
            while probe.is_asking and time.monotonic() < begun + patience_s:
                await asyncio.sleep(LOOK_S)
        asked = {what: probe.state for what, probe in probes.items()}
        states = {what: self._remembered(what) or state for what, state in asked.items()}
        return Report(asked["database"] == OK, {**states, "broker": self._broker_trouble() or OK})

    def _remembered(self, what: str) -> str | None:
        failed_at, state = self._failed.get(what, (-REMEMBERED_S, OK))
        return state if time.monotonic() - failed_at < REMEMBERED_S else None


class Probe:
    """One question, asked by at most one thread at a time."""

    def __init__(self, ask: Callable[[], None]) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._answered_at = -FRESH_S
        self._answer = OK
        self.is_asking = False

    @property
    def state(self) -> str:
        """The last answer, or `slow` while there is none to the question that was asked."""
        return "slow" if self.is_asking else self._answer

    def begin(self) -> None:
        """Ask, unless the last answer is fresh or still awaited."""
        with self._lock:
            if self.is_asking or time.monotonic() - self._answered_at < FRESH_S:
                return
            self.is_asking = True
        threading.Thread(target=self._run, name="health", daemon=True).start()

    def _run(self) -> None:
        try:
            self._ask()
            self._answer = OK
        except Exception as error:  # whatever it is, it is the answer
            log.warning("health_check_failed", error=str(error))
            self._answer = in_a_word(error)
        finally:
            self._answered_at = time.monotonic()
            self.is_asking = False


def in_a_word(error: Exception) -> str:
    """What is told to whoever asks, who needs no key: no host, no path; the log has the rest."""
    text = str(error).lower()
    return "full" if any(words in text for words in FULL) else "unavailable"


def broker_trouble(announcer: Announcer, subscription: OutcomeSubscription) -> Callable[[], str | None]:
    """What is wrong with the broker, as those have found who use it."""
    return lambda: announcer.trouble or subscription.trouble
