"""Announces work from a thread of its own, so that no broker makes a submission wait.

What waits to be announced is known by name: a run that is there already is not added twice. While the broker is away it
stays here, at most `WAITING_MAX` names, and is tried again at growing intervals; what is dropped or lost with the
process is announced by the sweeper, since messages are hints and the journal is the truth.
"""

from __future__ import annotations

import random
import time

import structlog

from jobs.dispatch import Announces
from jobs.thread_on_demand import ThreadOnDemand
from storage.errors import StorageError

log = structlog.get_logger()

WAITING_MAX = 10_000
RETRY_FIRST_S = 0.2
RETRY_MOST_S = 5.0
SLOW_S = 3.0
CLOSE_S = 2.0
SAMPLES = "samples"
"""Stands for samples among the names of runs, none of which is so short."""


class Announcer:
    """What `Dispatcher` does, later and elsewhere."""

    def __init__(self, dispatcher: Announces[bool]) -> None:
        self._dispatcher = dispatcher
        self._waiting: dict[str, None] = {}
        self._thread = ThreadOnDemand(self._run, name="announcer")
        self._begun_at: float | None = None
        self._failures = 0

    def announce_run(self, run_id: str) -> None:
        """Have it said that a run has work; returns at once."""
        self._add(run_id)

    def announce_samples(self) -> None:
        """Have it said that samples are queued; returns at once."""
        self._add(SAMPLES)

    @property
    def trouble(self) -> str | None:
        """What is wrong with the broker, as far as announcing has shown."""
        begun_at = self._begun_at
        if begun_at is not None and time.monotonic() - begun_at > SLOW_S:
            return f"has not taken a message for {time.monotonic() - begun_at:.0f} s"
        return f"has refused the last {self._failures} messages" if self._failures else None

    def close(self) -> None:
        """Announce what waits, unless that takes long."""
        self._thread.close(timeout_s=CLOSE_S)

    def _add(self, name: str) -> None:
        with self._thread.changed:
            if name not in self._waiting and len(self._waiting) >= WAITING_MAX:
                del self._waiting[next(iter(self._waiting))]
            self._waiting[name] = None
            self._thread.wake()

    def _run(self) -> None:
        while (name := self._next()) is not None:
            if self._announce(name):
                self._failures = 0
                continue
            self._failures += 1
            with self._thread.changed:
                self._waiting.setdefault(name)
            pause_s = min(RETRY_FIRST_S * 2 ** min(self._failures - 1, 10), RETRY_MOST_S)
            if self._thread.pause(pause_s * random.uniform(0.5, 1.0)):  # noqa: S311
                return

    def _next(self) -> str | None:
        """Wait for a name; None when closing and none is left."""
        with self._thread.changed:
            self._thread.wait_for(lambda: self._waiting)
            name = next(iter(self._waiting), None)
            if name is not None:
                del self._waiting[name]  # before it is announced: what happens from now on is announced again
            return name

    def _announce(self, name: str) -> bool:
        self._begun_at = time.monotonic()
        try:
            if name == SAMPLES:
                return self._dispatcher.announce_samples()
            return self._dispatcher.announce_run(name)
        except StorageError as error:  # whose lease it is cannot be looked up
            log.warning("announcement_failed", name=name, error=str(error))
            return False
        except Exception:  # without this thread nothing is announced any more
            log.exception("announcement_failed", name=name)
            return False
        finally:
            self._begun_at = None
