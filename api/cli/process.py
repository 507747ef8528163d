"""One started process: its output, its end, and the line over which one that waits is told to begin.

What always holds: it dies with the supervisor (on Linux also when that is killed), has its own process group, so that
Ctrl-C reaches the supervisor alone, and captured output is drained, so that it never blocks on a full pipe.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

PR_SET_PDEATHSIG = 1
BEGIN = b"begin\n"
LOADED, READY = "loaded", "ready"
"""What a process that waits for its turn says: it could begin; it has begun and takes work."""

# Looked up once: between fork and exec another thread may hold the loader's lock for good.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


class Process:
    """A running program.

    Args:
        argv: program and arguments.
        environment: variables on top of the supervisor's own.
        captured: whether `read` is to have its output; else it goes where the supervisor's goes.
        waits: whether it begins only when told, over a socket that is its standard input; the socket's end is also its
            own, where the kernel does not see to that.

    Attributes:
        begun_at: monotonic time at which it was started, or told to begin.
        loaded, ready: what it has said of itself; False for ever in a process that does not wait.
    """

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], *, captured: bool, waits: bool) -> None:
        self.environment = environment
        self.begun_at = time.monotonic()
        self.loaded = self.ready = False
        self.line: socket.socket | None = None
        theirs: socket.socket | None = None
        if waits:
            self.line, theirs = socket.socketpair()
        self._words = b""
        self._popen = subprocess.Popen(
            argv,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL if theirs is None else theirs.fileno(),
            stdout=subprocess.PIPE if captured else None,
            stderr=subprocess.STDOUT if captured else None,
            start_new_session=True,
            preexec_fn=_die_with(os.getpid()),  # noqa: PLW1509 (the function only makes two system calls)
        )
        self.output = self._popen.stdout
        if theirs is not None:
            theirs.close()
        for end in (self.output, self.line):
            if end is not None:
                os.set_blocking(end.fileno(), False)

    @property
    def pid(self) -> int:
        """Its number."""
        return self._popen.pid

    def begin(self) -> None:
        """Tell a process that waits to begin. One that has died meanwhile is noticed as any dead one."""
        self.begun_at = time.monotonic()
        if self.line is not None:
            with contextlib.suppress(OSError):
                self.line.sendall(BEGIN)

    def listen(self) -> bool:
        """Take in what a process that waits says of itself; False when it has closed the line."""
        assert self.line is not None
        with contextlib.suppress(BlockingIOError):
            try:
                said = self.line.recv(256)
            except ConnectionError:
                said = b""
            if not said:
                return False
            *words, self._words = (self._words + said).split(b"\n")
            self.loaded |= LOADED.encode() in words
            self.ready |= READY.encode() in words
        return True

    def read(self) -> bytes | None:
        """What lies in the output's pipe: empty at its end, None where nothing has come yet."""
        assert self.output is not None
        try:
            return os.read(self.output.fileno(), 1 << 16)
        except BlockingIOError:
            return None

    def find_code(self) -> int | None:
        """The return code, negative for a signal; None while it runs."""
        return self._popen.poll()

    def send(self, signal_number: int) -> None:
        """Send a signal, if it runs."""
        if self.find_code() is None:
            self._popen.send_signal(signal_number)

    def close(self) -> None:
        """Let go of what is left of a process that is over."""
        for end in (self.output, self.line):
            if end is not None:
                end.close()


def _die_with(parent_pid: int) -> Callable[[], None]:
    """What a child does before it becomes its program: ask the kernel to be killed with its parent."""

    def prepare() -> None:
        if _prctl is not None:
            _prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
            if os.getppid() != parent_pid:  # the parent died before the call above
                os._exit(1)

    return prepare
