"""One supervised process: how it is started, what it says, when it may be started again.

What always holds: a child dies with the supervisor (on Linux also when that is killed), has its own process group, so
that Ctrl-C reaches the supervisor alone, and its output is drained, so that it never blocks on a full pipe.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from api.cli.child_log import ChildLog

PR_SET_PDEATHSIG = 1
SETTLED_S = 5.0
"""A process that lived this long is no longer said to die quickly."""
BACKOFF_S = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Wait before the restart after the n-th quick death in a row."""

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class ChildSpec:
    """How one process is run.

    Attributes:
        role: as `piecework status` shows it.
        name: unique; names the log file.
        argv: program and arguments.
        make_environment: variables of one start, on top of the supervisor's own.
        is_ready: asked until it says yes; children after this one in the list wait for that. None: ready at once.
        on_death: told the environment of the start that died, once the next has begun.
        on_quick_death: told how many times in a row the process died soon after its start.
    """

    role: str
    name: str
    argv: tuple[str, ...]
    make_environment: Callable[[], Mapping[str, str]] = dict
    is_ready: Callable[[], bool] | None = None
    on_death: Callable[[Mapping[str, str]], None] | None = None
    on_quick_death: Callable[[int], None] | None = None


class Child:
    """The current process of a spec, or the wait for the next."""

    def __init__(self, spec: ChildSpec, log: ChildLog) -> None:
        self.spec = spec
        self.log = log
        self.environment: Mapping[str, str] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.ready = False
        self.start_at = 0.0
        self.num_quick_deaths = 0
        self._started_at = 0.0

    @property
    def pid(self) -> int | None:
        """Of the running process."""
        return self.process.pid if self.process else None

    def start(self) -> None:
        """Start the process; its output arrives at `stdout`, non-blocking."""
        self.environment = dict(self.spec.make_environment())
        self._started_at = time.monotonic()
        self.log.tail.clear()
        self.process = subprocess.Popen(
            self.spec.argv,
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with(os.getpid()),  # noqa: PLW1509 (the function only makes two system calls)
        )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self.ready = self.spec.is_ready is None

    def read_output(self) -> bool:
        """Move what the process has said to its log; False when it has closed its output."""
        data = self._read()
        if data:
            self.log.write(data)
        return data != b""

    def poll_ready(self) -> bool:
        """Whether the process has become ready since it was last asked."""
        if self.ready or self.process is None or self.spec.is_ready is None:
            return False
        self.ready = self.spec.is_ready()
        return self.ready

    def reap(self) -> int | None:
        """Notice that the process is over: its return code, and when the next one may begin."""
        if self.process is None or (code := self.process.poll()) is None:
            return None
        while data := self._read():
            self.log.write(data)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process = None
        self.ready = False
        quick = time.monotonic() - self._started_at < SETTLED_S
        self.num_quick_deaths = self.num_quick_deaths + 1 if quick else 0
        self.start_at = time.monotonic() + BACKOFF_S[min(max(self.num_quick_deaths, 1), len(BACKOFF_S)) - 1]
        return code

    def send(self, signal_number: int) -> None:
        """Send a signal to the process, if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal_number)

    def _read(self) -> bytes | None:
        """What lies in the pipe: empty at its end, None where nothing has come yet."""
        assert self.process is not None
        assert self.process.stdout is not None
        try:
            return os.read(self.process.stdout.fileno(), 1 << 16)
        except BlockingIOError:
            return None


def _die_with(parent_pid: int) -> Callable[[], None]:
    """What a child does before it becomes its program: ask the kernel to be killed with its parent."""

    def prepare() -> None:
        if _libc is not None:
            _libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
            if os.getppid() != parent_pid:  # the parent died before the call above
                os._exit(1)

    return prepare
