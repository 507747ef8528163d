"""Keeps the processes of the embedded service running: starts them in order, restarts what dies, stops them together.

One thread, one loop around `select`: a signal, output of a child, or a time that has come wakes it. Waking for a dead
child is the kernel's SIGCHLD, so its replacement starts within milliseconds. Everything slow (freeing a dead worker's
leases) is done by the hooks of `ChildSpec` in threads of their own.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from api.cli import process_table
from api.cli.child import Child, ChildSpec
from api.cli.child_log import ChildLog

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
READY_POLL_S = 0.03
BROKER_GRACE_S = 5.0
TELL_WHY_MAX = 2
"""A process that cannot start says so on the console this often; its log goes on."""
_IDLE_S = 60.0

Say = Callable[[str], None]


class Supervisor:
    """Runs the children of one data directory.

    Attributes:
        children: in the order in which they start; the first of the list stops last.
    """

    def __init__(
        self,
        data_dir: Path,
        specs: Sequence[ChildSpec],
        *,
        url: str,
        grace_s: float,
        say: Say,
        on_ready: Callable[[], None],
    ) -> None:
        self._data_dir = data_dir
        self._url = url
        self._grace_s = grace_s
        self._say = say
        self._on_ready = on_ready
        self._announced = False
        self._stopping = False
        self._broker_told = False
        self._kill_at = float("inf")
        self._selector = selectors.DefaultSelector()
        self.children = [Child(spec, self._open_log(spec)) for spec in specs]

    def run(self) -> None:
        """Run until SIGTERM, SIGINT or SIGHUP, then stop everything; a second signal does not wait for running work."""
        with self._signals():
            while not self._is_over():
                for child in self.children:
                    child.poll_ready()
                self._start_due()
                self._announce()
                for key, _ in self._selector.select(self._timeout_s()):
                    key.data()
                self._reap()
                if self._stopping:
                    self._stop_next()
        process_table.remove(self._data_dir)
        for child in self.children:
            child.log.close()

    # ------------------------------------------------------------------------------------------------ starting

    def _start_due(self) -> None:
        """Start what is to run and whose predecessors are ready."""
        if self._stopping:
            return
        for child in self.children:
            if child.process is None and child.start_at <= time.monotonic():
                self._start(child)
            if not child.ready and child.spec.role == "broker":
                return

    def _start(self, child: Child) -> None:
        child.start()
        assert child.process is not None
        assert child.process.stdout is not None
        self._selector.register(child.process.stdout, selectors.EVENT_READ, lambda: self._read(child))
        self._write_table()

    def _announce(self) -> None:
        if not self._announced and not self._stopping and all(child.ready for child in self.children):
            self._announced = True
            self._on_ready()

    # ------------------------------------------------------------------------------------------------ watching

    def _read(self, child: Child) -> None:
        if child.process is not None and child.process.stdout is not None and not child.read_output():
            self._selector.unregister(child.process.stdout)

    def _reap(self) -> None:
        for child in self.children:
            if child.process is None or child.process.poll() is None:
                continue
            pid, environment, stdout = child.process.pid, child.environment, child.process.stdout
            if stdout is not None:
                with contextlib.suppress(KeyError):
                    self._selector.unregister(stdout)
            code = child.reap()
            if self._stopping:
                self._write_table()
                continue
            self._report_death(child, pid, code)
            if child.num_quick_deaths and child.spec.on_quick_death:
                child.spec.on_quick_death(child.num_quick_deaths)
            self._start_due()
            self._write_table()
            if child.spec.on_death:
                child.spec.on_death(environment)

    def _report_death(self, child: Child, pid: int, code: int | None) -> None:
        wait_s = max(0.0, child.start_at - time.monotonic())
        when = f"in {wait_s:.1f} s" if wait_s > 0.05 else "now"
        self._say(f"{child.spec.name} (pid {pid}) {_ending(code)}; starting it again {when}. Log: {child.log.path}")
        if code is not None and code > 0 and child.num_quick_deaths <= TELL_WHY_MAX:
            for line in child.log.tail:
                self._say(f"  {child.spec.name} | {line}")

    # ------------------------------------------------------------------------------------------------ stopping

    def _request_stop(self) -> None:
        now = time.monotonic()
        if self._stopping:
            self._kill_at = now
            return
        self._say("stopping: running steps are finished first; press Ctrl-C again to stop at once")
        self._stopping = True
        self._kill_at = now + self._grace_s
        for child in self.children:
            if child.spec.role != "broker":
                child.send(signal.SIGTERM)

    def _stop_next(self) -> None:
        """The broker goes last, once nobody needs it; what outlives its grace is killed."""
        others = [child for child in self.children if child.spec.role != "broker" and child.process is not None]
        brokers = [child for child in self.children if child.spec.role == "broker" and child.process is not None]
        if not others and brokers and not self._broker_told and self._kill_at != float("inf"):
            self._broker_told = True
            for child in brokers:
                child.send(signal.SIGTERM)
            self._kill_at = min(self._kill_at, time.monotonic() + BROKER_GRACE_S)
        if time.monotonic() >= self._kill_at:
            for child in others or brokers:
                child.send(signal.SIGKILL)

    def _is_over(self) -> bool:
        return self._stopping and all(child.process is None for child in self.children)

    # ------------------------------------------------------------------------------------------------- helpers

    def _timeout_s(self) -> float:
        """Until the next time that something is due without being announced by the kernel."""
        now = time.monotonic()
        due = [self._kill_at, *(child.start_at for child in self.children if child.process is None)]
        waits = [at - now for at in due if at > now]
        if self._stopping and self._kill_at <= now:
            waits.append(READY_POLL_S)
        if not self._stopping and not all(child.ready for child in self.children if child.process):
            waits.append(READY_POLL_S)
        return min([_IDLE_S, *waits])

    def _write_table(self) -> None:
        pids = [("supervisor", os.getpid())]
        pids += [(child.spec.role, child.pid) for child in self.children if child.pid is not None]
        entries = [process_table.entry(role, pid) for role, pid in pids]
        process_table.write(self._data_dir, self._url, [one for one in entries if one is not None])

    def _open_log(self, spec: ChildSpec) -> ChildLog:
        return ChildLog(self._data_dir / "logs" / f"{spec.name}.log", lambda line: self._say(f"{spec.name} | {line}"))

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Signals arrive as bytes in a pipe that the loop selects on."""
        read_fd, write_fd = os.pipe()
        for fd in (read_fd, write_fd):
            os.set_blocking(fd, False)
        self._selector.register(read_fd, selectors.EVENT_READ, lambda: self._take_signals(read_fd))
        taken = {*STOP_SIGNALS, signal.SIGCHLD}
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # as nohup sets it
            taken.remove(signal.SIGHUP)
        previous = {number: signal.signal(number, _ignore) for number in taken}
        previous_fd = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous_fd)
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._selector.close()
            os.close(read_fd)
            os.close(write_fd)

    def _take_signals(self, read_fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in os.read(read_fd, 256):
                if number in STOP_SIGNALS:
                    self._request_stop()


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """The wake-up pipe carries the signal; a handler must exist for that."""


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
    return f"ended with code {code}"
