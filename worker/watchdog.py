"""Ends a worker whose engine makes no progress, whatever it hangs in, with a supervisor or without.

Two hands hold the trigger. This thread looks at the engine once a second; when a step passes its deadline, it notes in
the journal what the worker was executing, and exits. Native code that never lets Python run again stops this thread
too: then a timer of `faulthandler` in a C thread, which needs no interpreter, writes where every thread stands and
exits. The timer is wound up at every look, so it goes off only when no look has come for long.

Waiting for database or object store is no hanging: the engine says so while it waits (`Committer.on_wait`).
"""

from __future__ import annotations

import faulthandler
import os
import threading
from collections.abc import Callable
from typing import Protocol

import structlog

from storage.deaths import UNSEEN_EXIT_STATUS, Cause
from worker.settings import WorkerSettings

log = structlog.get_logger()

LOOK_S = 1.0
STUCK_EXIT_STATUS = 70
STDERR = 2
"""By its number: `sys.stderr` may be a stand-in that is no file."""
BLOCKED_MAX_S = 60.0
"""No Python for this long, whatever the deadline of a step: leases have expired meanwhile, and nothing can be saved."""
LEASES_MAX = 3
GRACE_S = 2.0
"""By so much the timer comes after this thread, which has better words."""
LAST_WORDS_S = 10.0


class Engine(Protocol):
    """What is looked at.

    Attributes:
        is_cut_off: it has ended because storage refused it, whatever it was executing.
    """

    is_cut_off: bool

    @property
    def stuck_s(self) -> float:
        """For how long it has made no progress."""
        ...

    @property
    def is_draining(self) -> bool:
        """Whether it ends because it was asked to."""
        ...

    def is_alive(self) -> bool:
        """Whether its thread runs."""
        ...


class Watchdog(threading.Thread):
    """Looks after one engine."""

    def __init__(self, engine: Engine, settings: WorkerSettings, *, confess: Callable[[Cause], None]) -> None:
        """Make it; `start` lets it look.

        Args:
            confess: notes in the journal how this worker ends.
        """
        super().__init__(name="watchdog", daemon=True)
        self._engine = engine
        self._deadline_s = settings.step_deadline_s
        self._blocked_max_s = min(self._deadline_s, max(BLOCKED_MAX_S, LEASES_MAX * settings.lease_s))
        self._confess = confess
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Look no more."""
        self._stopping.set()
        self.join()

    def run(self) -> None:
        """Look until stopped."""
        faulthandler.enable(STDERR)
        try:
            while not self._stopping.is_set():
                left_s = self._deadline_s - self._engine.stuck_s
                died = not self._engine.is_alive() and not self._engine.is_draining
                if died or left_s <= 0:
                    self._end()
                wind_up(min(self._blocked_max_s, left_s + GRACE_S))
                self._stopping.wait(min(LOOK_S, left_s))
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _end(self) -> None:
        """Say what was executed, if the database lets us, and exit: threads in native code cannot be ended."""
        wind_up(LAST_WORDS_S + GRACE_S)
        log.critical("engine_stuck", seconds=round(self._engine.stuck_s), alive=self._engine.is_alive())
        told = threading.Event()
        threading.Thread(target=self._try_to_confess, args=(told,), daemon=True).start()
        os._exit(STUCK_EXIT_STATUS if told.wait(LAST_WORDS_S) else UNSEEN_EXIT_STATUS)

    def _try_to_confess(self, told: threading.Event) -> None:
        try:
            self._confess(Cause.STOPPED if self._engine.is_cut_off else Cause.FAULT)
        except Exception:
            log.exception("death_not_noted")
            return
        told.set()


def wind_up(seconds: float) -> None:
    """Have the process ended in so many seconds, unless this is called again before."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR)
