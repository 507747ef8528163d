"""Keeps processes running: starts them in order, restarts what dies, stops them together.

One thread, one loop around `select`: a signal, output of a child, or a time that has come wakes it. Waking for a dead
child is the kernel's SIGCHLD, so its replacement starts within milliseconds; where a fork server is among the children,
a worker is there at once, too. Everything slow (freeing a dead worker's leases) is done by the hooks of `ChildSpec` in
threads of their own.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from api.cli.child import NEVER, Child, ChildSpec, Death
from api.cli.child_log import ChildLog
from api.cli.process import Process, reap_orphans
from api.cli.signal_pipe import STOP_SIGNALS, signal_pipe

log = structlog.get_logger()

READY_POLL_S = 0.03
BROKER_GRACE_S = 5.0
FORKSERVER = "forkserver"
"""The role of the child that makes others; at most one."""
LOAD_S = 120.0
"""A fork server that has not loaded by then is waited for no longer."""
HANG_S = 120.0
"""A forked process that is not ready by then is taken to hang, as one would that a fork has left without threads."""
TELL_WHY_MAX = 2
"""A process that cannot start says so on the console this often; its log goes on."""
_IDLE_S = 60.0
_JUST_PASSED_S = 1.0
"""A time that has come since it was last looked for is not slept over."""

Say = Callable[[str], None]
Running = Sequence[tuple[str, int]]
"""Role and pid of every process."""


class Supervisor:
    """Runs the children of one service, or one part and what makes it.

    Args:
        specs: in the order in which they start; the first of the list stops last.
        grace_s: how long a child may take to stop before it is killed; infinite where somebody else sees to that.
        say: takes lines for a person.
        logs: directory of the children's logs; None lets their output go where ours goes.
        reaps_orphans: whether all children of this process are the supervisor's, also those that it has adopted.
        on_ready: called once, when all children are ready for the first time.
        on_change: told all processes whenever one has started or ended; none at the end.

    Attributes:
        children: the places, in order.
        failed: the child that had to start and did not, which ended the supervisor.
    """

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        *,
        grace_s: float,
        say: Say,
        logs: Path | None,
        reaps_orphans: bool = False,
        on_ready: Callable[[], None] = lambda: None,
        on_change: Callable[[Running], None] = lambda _running: None,
    ) -> None:
        self._grace_s = grace_s
        self._say = say
        self._on_ready = on_ready
        self._logs = logs
        self._on_change = on_change
        self._reaps_orphans = reaps_orphans
        self.failed: str | None = None
        self._announced = False
        self._stopping = False
        self._broker_told = False
        self._kill_at = float("inf")
        self._selector = selectors.DefaultSelector()
        self.children = [Child(spec, self._open_log(spec)) for spec in specs]
        self._forkserver = next((child for child in self.children if child.spec.role == FORKSERVER), None)

    def run(self) -> None:
        """Run until SIGTERM, SIGINT or SIGHUP, then stop everything; a second signal does not wait for running work.

        A child that must start and does not ends it, too.
        """
        with signal_pipe() as signals, self._selector:
            self._selector.register(signals, selectors.EVENT_READ, lambda: self._take_signals(signals))
            while not self._is_over():
                for child in self.children:
                    child.poll_ready()
                self._start_due()
                self._announce()
                for key, _ in self._selector.select(self._timeout_s()):
                    key.data()
                self._kill_hung()
                self._reap()
                if self._stopping:
                    self._stop_next()
        self._on_change([])
        for child in self.children:
            if child.log is not None:
                child.log.close()

    # ------------------------------------------------------------------------------------------------ starting

    def _start_due(self) -> None:
        """Start what is to run and whose predecessors are ready."""
        if self._stopping:
            return
        for child in self.children:
            now = time.monotonic()
            if child.process is None and child.start_at <= now and not self._awaits_forkserver(child):
                self._start(child)
            if not child.ready and child.spec.role == "broker":
                return

    def _start(self, child: Child) -> None:
        forkserver = self._forkserver.process if child.spec.forked and self._forkserver else None
        forked = child.start(forkserver if forkserver is not None and forkserver.ready else None)
        assert child.process is not None
        self._watch(child, child.process)
        log.info("child_started", child=child.spec.name, pid=child.process.pid, forked=forked)
        self._tell_change()

    def _awaits_forkserver(self, child: Child) -> bool:
        """Whether a fork server is about to be ready, which then makes this process in no time."""
        server = self._forkserver
        if server is None or server.process is None or server.broken or not child.spec.awaits_fork:
            return False
        return not server.process.ready and time.monotonic() < server.process.begun_at + LOAD_S

    def _watch(self, child: Child, process: Process) -> None:
        if child.log is not None:
            assert process.output is not None
            self._selector.register(process.output, selectors.EVENT_READ, lambda: self._read(child, process))
        if process.line is not None:
            self._selector.register(process.line, selectors.EVENT_READ, lambda: self._listen(child, process))

    def _unwatch(self, process: Process) -> None:
        for end in (process.output, process.line):
            if end is not None:
                with contextlib.suppress(KeyError):
                    self._selector.unregister(end)

    def _announce(self) -> None:
        needed = [child for child in self.children if child is not self._forkserver]
        ready = all(child.ready or self._awaits_forkserver(child) for child in needed)
        if ready and not self._announced and not self._stopping:
            self._announced = True
            self._on_ready()

    # ------------------------------------------------------------------------------------------------ watching

    def _read(self, child: Child, process: Process) -> None:
        if process is child.process and not child.read(process):
            assert process.output is not None
            self._selector.unregister(process.output)

    def _listen(self, child: Child, process: Process) -> None:
        if process is not child.process:
            return
        was_ready = process.ready
        if not child.listen(process):
            assert process.line is not None
            self._selector.unregister(process.line)
        if process.ready and not was_ready:
            log.info("child_ready", child=child.spec.name, pid=process.pid)

    def _kill_hung(self) -> None:
        for child in self.children:
            if child.kill_hung(HANG_S):
                log.warning("child_hung", child=child.spec.name, pid=child.pid)
                self._say(f"{child.spec.name} (pid {child.pid}) did not become ready in {HANG_S:g} s and is killed")

    def _reap(self) -> None:
        for child in self.children:
            if child.process is not None and child.process.find_code() is not None:
                self._reap_child(child, child.process)
        if self._reaps_orphans:
            reap_orphans([child.pid for child in self.children if child.pid is not None])

    def _reap_child(self, child: Child, process: Process) -> None:
        self._unwatch(process)
        child.reap()
        code = child.code or 0
        if self._stopping:
            self._tell_change()
            if code != 0 and child.spec.on_death:
                stopped = code > 0 or code in (-signal.SIGTERM, -signal.SIGKILL)
                child.spec.on_death(Death(process.environment, code, stopped=stopped))
            return
        if child.spec.must_start and not child.ever_ready and not child.goes_by_itself and code > 0:
            log.error("child_did_not_start", child=child.spec.name, code=code)
            self._say(f"{child.spec.name} (pid {process.pid}) {_ending(code)}, before it was ever ready")
            self._quote(child)
            self.failed = child.spec.name
            self._stop()
            return
        self._report_death(child, process, code)
        if child.num_quick_deaths and child.spec.on_quick_death:
            child.spec.on_quick_death(child.num_quick_deaths)
        self._start_due()
        self._tell_change()
        if child.spec.on_death:
            child.spec.on_death(Death(process.environment, code, stopped=False))

    def _report_death(self, child: Child, process: Process, code: int) -> None:
        log.warning("child_died", child=child.spec.name, pid=process.pid, code=code)
        self._say(_obituary(child.spec.name, process, child.start_at - time.monotonic(), child.log))
        if child.log is not None and code > 0 and child.num_quick_deaths <= TELL_WHY_MAX:
            self._quote(child)

    def _quote(self, child: Child) -> None:
        """Say what the child has said last."""
        for line in child.log.tail if child.log is not None else ():
            self._say(f"  {child.spec.name} | {line}")

    # ------------------------------------------------------------------------------------------------ stopping

    def _request_stop(self) -> None:
        now = time.monotonic()
        if self._stopping:
            self._kill_at = now
            return
        self._say("stopping: running steps are finished first; press Ctrl-C again to stop at once")
        for child in self.children:
            if child.process is None:
                child.code = None  # what has died before is not how it stops
        self._stop()

    def _stop(self) -> None:
        self._stopping = True
        self._kill_at = time.monotonic() + self._grace_s
        for child in self.children:
            if child.spec.role != "broker":
                child.send(signal.SIGTERM)

    def _stop_next(self) -> None:
        """The broker goes last, once nobody needs it; what outlives its grace is killed."""
        others = [child for child in self.children if child.spec.role != "broker" and child.process]
        brokers = [child for child in self.children if child.spec.role == "broker" and child.process]
        if not others and brokers and not self._broker_told and self._kill_at != float("inf"):
            self._broker_told = True
            for child in brokers:
                child.send(signal.SIGTERM)
            self._kill_at = min(self._kill_at, time.monotonic() + BROKER_GRACE_S)
        if time.monotonic() >= self._kill_at:
            for child in others or brokers:
                child.send(signal.SIGKILL)

    def _is_over(self) -> bool:
        return self._stopping and not any(child.process for child in self.children)

    # ------------------------------------------------------------------------------------------------- helpers

    def _timeout_s(self) -> float:
        """Until the next time that something is due without being announced by the kernel."""
        now = time.monotonic()
        due = [self._kill_at, *(child.start_at for child in self.children if child.process is None)]
        for child in self.children:
            if child.spec.speaks and child.process is not None and not child.process.ready:
                due.append(child.process.begun_at + (LOAD_S if child is self._forkserver else HANG_S))
        waits = [max(at - now, READY_POLL_S) for at in due if at > now - _JUST_PASSED_S]
        if self._stopping and self._kill_at <= now:
            waits.append(READY_POLL_S)
        if not self._stopping and not all(child.ready for child in self.children if child.process):
            waits.append(READY_POLL_S)
        return min([_IDLE_S, *waits])

    def _tell_change(self) -> None:
        running = [("supervisor", os.getpid())]
        running += [(child.spec.role, child.process.pid) for child in self.children if child.process is not None]
        self._on_change(running)

    def _open_log(self, spec: ChildSpec) -> ChildLog | None:
        if self._logs is None:
            return None
        return ChildLog(self._logs / f"{spec.name}.log", lambda line: self._say(f"{spec.name} | {line}"))

    def _take_signals(self, read_fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in os.read(read_fd, 256):
                if number in STOP_SIGNALS:
                    self._request_stop()


def _obituary(name: str, process: Process, wait_s: float, log_file: ChildLog | None = None) -> str:
    when = f"starting it again {f'in {wait_s:.1f} s' if wait_s > 0.05 else 'now'}"
    where = f" Log: {log_file.path}" if log_file is not None else ""
    then = when if wait_s < NEVER else "it is not started again"
    return f"{name} (pid {process.pid}) {_ending(process.find_code())}; {then}.{where}"


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
    return f"ended with code {code}"
