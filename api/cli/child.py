"""One place among the supervised processes: who fills it, and when the next one may."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import structlog

from api.cli.child_log import ChildLog
from api.cli.process import ForkError, Process, Start, fork_by, program

log = structlog.get_logger()

NEVER = float("inf")
SETTLED_S = 5.0
"""A process that lived this long is no longer said to die quickly."""
BACKOFF_S = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Wait before the restart after the n-th quick death in a row."""
COSTLY_BACKOFF_S = (0.0, 1.0, 5.0, 15.0, 60.0)
"""The same for a process whose start costs much computing, and without which all goes on."""


@dataclass(frozen=True)
class Death:
    """How a process of a place came to its end.

    Attributes:
        environment: variables of the start that died.
        code: the return code, negative for a signal.
        stopped: whether it died of what the supervisor sent it when stopping.
    """

    environment: Mapping[str, str]
    code: int
    stopped: bool


@dataclass(frozen=True)
class ChildSpec:
    """How one process is run.

    Attributes:
        role: as `piecework status` shows it.
        name: unique; names the log file.
        argv: program and arguments.
        make_environment: variables of one start, on top of the supervisor's own.
        is_ready: asked until it says yes; children after this one in the list wait for that. None: ready at once.
        on_begun: told whenever a process of it has said that it is ready; needs `speaks`.
        on_death: told of a death, once the next process has begun, and of an end by force when stopping.
        on_quick_death: told how many times in a row the process died soon after its start.
        speaks: the program says over its standard input, a socket, when it is ready (`process.py`).
        forked: made by the fork server of the supervisor, where there is one that is not broken; needs `speaks`.
        awaits_fork: while the fork server loads, it waits: started as a program, it would take as long.
        must_start: an end with a code above 0 before it was ever ready ends the supervisor; needs `speaks`.
        backoff_s: wait before the restart after the n-th quick death in a row.
        unfit: exit code of a program that must not be started again.
    """

    role: str
    name: str
    argv: tuple[str, ...]
    make_environment: Callable[[], Mapping[str, str]] = dict
    is_ready: Callable[[], bool] | None = None
    on_begun: Callable[[], None] | None = None
    on_death: Callable[[Death], None] | None = None
    on_quick_death: Callable[[int], None] | None = None
    speaks: bool = False
    forked: bool = False
    awaits_fork: bool = False
    must_start: bool = False
    backoff_s: tuple[float, ...] = BACKOFF_S
    unfit: int | None = None


class Child:
    """The current process of a spec, or the wait for the next.

    Attributes:
        log: takes the output; None leaves it to go where the supervisor's goes.
        start_at: monotonic time from which the process may be started.
        code: return code of the latest process that ended; None also where none ran when it was to stop.
        ever_ready: whether one of its processes has said that it is ready.
        broken: whether the latest process that ended never said so, and none has since.
        goes_by_itself: whether the next one is started as a program: one that was forked has ended or hung before it
            was ready.
    """

    def __init__(self, spec: ChildSpec, log: ChildLog | None) -> None:
        self.spec = spec
        self.log = log
        self.process: Process | None = None
        self.ready = False
        self.ever_ready = False
        self.broken = False
        self.goes_by_itself = False
        self.start_at = 0.0
        self.code: int | None = None
        self.num_quick_deaths = 0
        self._is_forked = False
        self._hung = False

    @property
    def pid(self) -> int | None:
        """Of the running process."""
        return self.process.pid if self.process else None

    def start(self, forkserver: Process | None) -> bool:
        """Start the process; whether the fork server made it.

        Args:
            forkserver: that is to make it. One that does not is killed.
        """
        if self.log is not None:
            self.log.tail.clear()
        self.ready = self.spec.is_ready is None
        environment = dict(self.spec.make_environment())
        self._is_forked = self._hung = False
        if forkserver is not None and not self.goes_by_itself:
            try:
                self.process = self._launch(fork_by(forkserver, self.spec.argv), environment)
                self.process.begin()
                self._is_forked = True
            except ForkError as error:
                log.warning("fork_failed", child=self.spec.name, forkserver=forkserver.pid, reason=str(error))
                forkserver.send(signal.SIGKILL)
        if not self._is_forked:
            self.process = self._launch(program(self.spec.argv), environment)
        return self._is_forked

    def listen(self, process: Process) -> bool:
        """Take in what a process says of itself; False when it will say nothing more."""
        was_ready = process.ready
        hears_more = process.listen()
        if process.ready and not was_ready:
            self.ever_ready, self.broken = True, False
            if self.spec.on_begun is not None:
                self.spec.on_begun()
        return hears_more

    def read(self, process: Process) -> bool:
        """Move what a process has put out to the log; False when it has closed its output."""
        data = process.read()
        if data and self.log is not None:
            self.log.write(data)
        return data != b""

    def poll_ready(self) -> bool:
        """Whether the process has become ready since it was last asked."""
        if self.ready or self.process is None or self.spec.is_ready is None:
            return False
        self.ready = self.spec.is_ready()
        return self.ready

    def kill_hung(self, limit_s: float) -> bool:
        """Kill a forked process that is not ready this long after its start; whether it was killed now."""
        process = self.process
        if process is None or process.ready or self._hung or not self._is_forked:
            return False
        self._hung = time.monotonic() >= process.begun_at + limit_s
        if self._hung:
            process.send(signal.SIGKILL)
        return self._hung

    def reap(self) -> None:
        """Note that the process is over: its code, and when the next one may begin."""
        assert self.process is not None
        self.code = self.process.find_code()
        self.broken = self.spec.speaks and not self.process.ready
        was_killed = self.code == -signal.SIGKILL and not self._hung
        self.goes_by_itself = self.broken and self._is_forked and not was_killed
        quick = time.monotonic() - self.process.begun_at < SETTLED_S or self.broken
        self.num_quick_deaths = self.num_quick_deaths + 1 if quick else 0
        self.start_at = time.monotonic() + _wait_s(self.spec.backoff_s, self.num_quick_deaths)
        if self.code == self.spec.unfit:
            self.start_at = NEVER
        while self.log is not None and (data := self.process.read()):
            self.log.write(data)
        self.process.close()
        self.process, self.ready = None, False

    def send(self, signal_number: int) -> None:
        """Send a signal to the process, if it runs."""
        if self.process is not None:
            self.process.send(signal_number)

    def _launch(self, start: Start, environment: Mapping[str, str]) -> Process:
        return Process(start, environment, captured=self.log is not None, speaks=self.spec.speaks)


def _wait_s(waits: tuple[float, ...], num_quick: int) -> float:
    return waits[min(max(num_quick, 1), len(waits)) - 1]
