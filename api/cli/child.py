"""One place among the supervised processes: who fills it, who waits to fill it next, and when."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from api.cli.child_log import ChildLog
from api.cli.process import Process

NEVER = float("inf")
SETTLED_S = 5.0
"""A process that lived this long is no longer said to die quickly."""
BACKOFF_S = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Wait before the restart after the n-th quick death in a row."""
SPARE_BACKOFF_S = (0.5, 1.0, 5.0, 15.0, 60.0)
"""Wait before the restart after the n-th spare in a row that died before it was loaded: each costs much computing."""


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
        on_begun: told whenever a process of it has said that it is ready; needs `waits`.
        on_death: told of a death, once the next process has begun, and of an end by force when stopping.
        on_quick_death: told how many times in a row the process died soon after its start.
        waits: the program begins only when told (`process.py`).
        spare: whether another one, loaded, is to wait beside the running one; needs `waits`.
        must_start: an end before it was ever ready ends the supervisor with its code; needs `waits`.
    """

    role: str
    name: str
    argv: tuple[str, ...]
    make_environment: Callable[[], Mapping[str, str]] = dict
    is_ready: Callable[[], bool] | None = None
    on_begun: Callable[[], None] | None = None
    on_death: Callable[[Death], None] | None = None
    on_quick_death: Callable[[int], None] | None = None
    waits: bool = False
    spare: bool = False
    must_start: bool = False


class Child:
    """The current process of a spec, or the wait for the next; and its spare.

    Attributes:
        log: takes the output; None leaves it to go where the supervisor's goes.
        start_at, spare_at: monotonic times from which the process, or the spare, may be started.
        code: return code of the latest process that ended.
        ever_ready: whether one of its processes has said that it is ready.
    """

    def __init__(self, spec: ChildSpec, log: ChildLog | None) -> None:
        self.spec = spec
        self.log = log
        self.process: Process | None = None
        self.spare: Process | None = None
        self.ready = False
        self.ever_ready = False
        self.start_at = 0.0
        self.spare_at = NEVER
        self.code: int | None = None
        self.num_quick_deaths = 0
        self._num_unloaded = 0

    @property
    def pid(self) -> int | None:
        """Of the running process."""
        return self.process.pid if self.process else None

    @property
    def processes(self) -> list[Process]:
        """The running one and the spare, as far as there are such."""
        return [process for process in (self.process, self.spare) if process is not None]

    def start(self) -> Process:
        """Have the spare begin; start a process where there is none. The next spare waits until this one is ready."""
        if self.log is not None:
            self.log.tail.clear()
        self.process, self.spare, self.spare_at = self.spare or self._launch(), None, NEVER
        self.process.begin()
        self.ready = self.spec.is_ready is None
        return self.process

    def start_spare(self) -> Process:
        """Start the process that waits for this one's death."""
        self.spare, self.spare_at = self._launch(), NEVER
        return self.spare

    def listen(self, process: Process) -> bool:
        """Take in what a process says of itself; False when it will say nothing more."""
        was_ready = process.ready
        hears_more = process.listen()
        if process.ready and not was_ready:
            self.ever_ready = True
            self.spare_at = time.monotonic() if self.spec.spare else NEVER
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

    def reap(self) -> None:
        """Note that the process is over: its code, and when the next one may begin."""
        assert self.process is not None
        self.code = self.process.find_code()
        quick = time.monotonic() - self.process.begun_at < SETTLED_S
        self.num_quick_deaths = self.num_quick_deaths + 1 if quick else 0
        self.start_at = time.monotonic() + _wait_s(BACKOFF_S, self.num_quick_deaths)
        self._close(self.process)
        self.process, self.ready = None, False

    def reap_spare(self) -> None:
        """Note that the spare is over, and when the next one may be started."""
        assert self.spare is not None
        self._num_unloaded = 0 if self.spare.loaded else self._num_unloaded + 1
        self.spare_at = time.monotonic() + _wait_s(SPARE_BACKOFF_S, self._num_unloaded)
        self._close(self.spare)
        self.spare = None

    def send(self, signal_number: int) -> None:
        """Send a signal to the process and its spare, if they run."""
        for process in self.processes:
            process.send(signal_number)

    def _launch(self) -> Process:
        environment = dict(self.spec.make_environment())
        return Process(self.spec.argv, environment, captured=self.log is not None, waits=self.spec.waits)

    def _close(self, process: Process) -> None:
        while self.log is not None and (data := process.read()):
            self.log.write(data)
        process.close()


def _wait_s(waits: tuple[float, ...], num_quick: int) -> float:
    return waits[min(max(num_quick, 1), len(waits)) - 1]
