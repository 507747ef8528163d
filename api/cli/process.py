"""One started process: its output, its end, and the line over which it says that it is ready.

What always holds: it dies with the supervisor (on Linux also when that is killed), has its own process group, so that
Ctrl-C reaches the supervisor alone, and captured output is drained, so that it never blocks on a full pipe.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
BEGIN = b"begin\n"
READY, FORKED = b"ready", b"forked "
"""What a process says over its line: it takes work; a fork server has made a process, whose number follows."""
FORK_S = 2.0
"""A fork server that has not answered by then is stopped or lost: a fork takes hundredths of a second."""

# Looked up once: between fork and exec another thread may hold the loader's lock for good.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


class ForkError(Exception):
    """A fork server has made no process."""


class Handle(Protocol):
    """A child of ours, as `subprocess.Popen` has it."""

    @property
    def pid(self) -> int:
        """Its number."""

    def poll(self) -> int | None:
        """The return code, negative for a signal; None while it runs."""

    def send_signal(self, sig: int) -> None:
        """Send a signal, if it runs."""


Start = Callable[[Mapping[str, str], socket.socket | None, int | None], Handle]
"""Starts a process with these variables on top of the supervisor's own, its end of the line as standard input, and
what takes its output, if that is captured."""


class Process:
    """A running process.

    Args:
        start: `program` or `fork_by`.
        environment: variables on top of the supervisor's own.
        captured: whether `read` is to have its output; else it goes where the supervisor's goes.
        speaks: whether it says over a socket, which is its standard input, when it is ready.

    Attributes:
        begun_at: monotonic time at which it was started.
        ready: whether it has said so; False for ever in a process that does not speak.

    Raises:
        ForkError: the fork server has made none.
    """

    def __init__(self, start: Start, environment: Mapping[str, str], *, captured: bool, speaks: bool) -> None:
        self.environment = environment
        self.begun_at = time.monotonic()
        self.ready = False
        self._words = b""
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            line = output = None
            self.line: socket.socket | None = None
            self.output: int | None = None
            if speaks:
                self.line, line = _socket_pair(ours, theirs)
            if captured:
                self.output, output = _pipe(ours, theirs)
            self._handle = start(environment, line, output)
            self._ours = ours.pop_all()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._handle.pid

    def begin(self) -> None:
        """Tell a forked process that it is wanted: one that is not told ends with its line."""
        assert self.line is not None
        with contextlib.suppress(OSError):  # one that has died meanwhile is noticed as any dead one
            self.line.send(BEGIN)

    def listen(self) -> bool:
        """Take in what it says of itself; False when it has closed the line."""
        return self._hear() is not None

    def fork(
        self, argv: Sequence[str], environment: Mapping[str, str], line: socket.socket | None, output: int | None
    ) -> Handle:
        """Have a fork server that is ready make a process, which becomes our own child.

        Raises:
            ForkError: it has not; what it may have made is gone with its line.
        """
        assert self.line is not None
        assert line is not None
        fds = [line.fileno(), *([] if output is None else [output])]
        deadline = time.monotonic() + FORK_S
        try:
            request = json.dumps({"argv": argv, "environment": dict(environment)})
            socket.send_fds(self.line, [request.encode() + b"\n"], fds)
        except OSError as error:
            raise ForkError(f"the fork server takes no requests: {error}") from error
        while (wait_s := deadline - time.monotonic()) > 0:
            if not select.select([self.line], [], [], wait_s)[0]:
                break
            words = self._hear()
            if words is None:
                raise ForkError("the fork server has ended")
            for word in words:
                if word.startswith(FORKED):
                    return _adopt(int(word.removeprefix(FORKED)))
        raise ForkError(f"the fork server has not answered within {FORK_S:.0f} s")

    def read(self) -> bytes | None:
        """What lies in the output's pipe: empty at its end, None where nothing has come yet."""
        assert self.output is not None
        try:
            return os.read(self.output, 1 << 16)
        except BlockingIOError:
            return None

    def find_code(self) -> int | None:
        """The return code, negative for a signal; None while it runs."""
        return self._handle.poll()

    def send(self, signal_number: int) -> None:
        """Send a signal, if it runs."""
        if self.find_code() is None:
            self._handle.send_signal(signal_number)

    def close(self) -> None:
        """Let go of what is left of a process that is over."""
        self._ours.close()

    def _hear(self) -> Sequence[bytes] | None:
        """The words that have come; None when the line is closed."""
        assert self.line is not None
        words: Sequence[bytes] = []
        with contextlib.suppress(BlockingIOError):
            try:
                said = self.line.recv(256)
            except ConnectionError:
                said = b""
            if not said:
                return None
            *words, self._words = (self._words + said).split(b"\n")
            self.ready |= READY in words
        return words


def python(module: str) -> tuple[str, ...]:
    """The command line of a part. -P: a folder `api` in the current directory must not be taken for ours."""
    return (sys.executable, "-P", "-m", module)


def program(argv: Sequence[str]) -> Start:
    """Start a process as a program of its own."""

    def start(environment: Mapping[str, str], line: socket.socket | None, output: int | None) -> Handle:
        return subprocess.Popen(
            argv,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL if line is None else line.fileno(),
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_die_with(os.getpid()),  # noqa: PLW1509 (the function only makes two system calls)
        )

    return start


def fork_by(server: Process, argv: Sequence[str]) -> Start:
    """Start a process by having a fork server make it, whose command line names one of its modules."""
    return functools.partial(server.fork, argv)


def adopt_orphans(wanted: bool = True) -> bool:
    """Be the parent of all descendants that lose theirs, as a fork server's processes do; or no longer.

    Returns:
        Whether the kernel does so.
    """
    return _prctl is not None and _prctl(PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0) == 0


def reap_orphans(known: Collection[int]) -> None:
    """Wait for the dead among adopted processes that nobody here knows of, so that they do not stay as zombies.

    Args:
        known: process ids of children that somebody else waits for.
    """
    with contextlib.suppress(ChildProcessError):
        while (dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and dead.si_pid not in known:
            os.waitpid(dead.si_pid, 0)


def _adopt(pid: int) -> _Adopted:
    made = _Adopted(pid)
    try:
        made.poll()
    except ChildProcessError as error:
        raise ForkError(f"process {pid} did not become our child: call `adopt_orphans` first") from error
    return made


class _Adopted:
    """A child that somebody else has started, and left to us."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def send_signal(self, sig: int) -> None:
        os.kill(self.pid, sig)


def _socket_pair(ours: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    line, other = socket.socketpair()
    line.setblocking(False)
    return ours.enter_context(line), theirs.enter_context(other)


def _pipe(ours: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[int, int]:
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    ours.callback(os.close, read_end)
    theirs.callback(os.close, write_end)
    return read_end, write_end


def _die_with(parent_pid: int) -> Callable[[], None]:
    """What a child does before it becomes its program: ask the kernel to be killed with its parent."""

    def prepare() -> None:
        if _prctl is not None:
            _prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
            if os.getppid() != parent_pid:  # the parent died before the call above
                os._exit(1)

    return prepare
