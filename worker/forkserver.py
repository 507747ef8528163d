"""A process that has loaded everything a worker needs, and makes workers and other parts of itself by `fork`.

Loading torch, transformers and the rest takes seconds of computing; a fork takes hundredths of one, and shares what has
been loaded. So one such process beside any number of workers brings back each that dies, at once, as often as it takes.

Its standard input is a socket whose other end the supervisor holds. A line of JSON on it, command line and variables of
a part, with the file descriptors of that part's own standard input and, if it is captured, output, asks for one; the
answer is its process id. The end of that socket means "nobody needs you any more". What is made is then a child of the
supervisor: its parent here ends at once, and the supervisor adopts orphans. So a fork server may die without any harm.

What always holds: it computes nothing and touches no device. A pool of threads that a parent has begun hangs the child
that uses it, and CUDA cannot be used in a child of a process that has initialised it: `check_fit` looks for both.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from storage.supervision import LINE_FD, call_oneself, say, say_ready

FORKSERVER = "--forkserver"
FORKSERVER_NAME = "forkserver"
"""As `ps` and `top` show it (Linux)."""
UNFIT = 3
"""Exit status of one whose children could not work: starting it again would not help."""
NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"
"""Has `torch.cuda.is_available` ask without initialising CUDA."""
_PR_SET_PDEATHSIG = 1
_CUDA_SUCCESS = 0
_REQUEST_MAX = 1 << 16
_LOOK_S = 0.0005


class UnfitError(Exception):
    """A process forked from this one could not work."""


def serve(modules: Sequence[str] = ()) -> Sequence[str]:
    """Load, and fork a process for every request. Returns in each of these; the server itself ends here.

    Args:
        modules: names of what is imported beside all that a worker needs.

    Returns:
        The command line with which the process would have been started as a program; `go_on` does what that does.
    """
    signal.signal(signal.SIGTERM, lambda _number, _frame: os._exit(0))
    call_oneself(FORKSERVER_NAME)
    _load(modules)
    supervisor = os.getppid()
    line = socket.socket(fileno=LINE_FD)
    say_ready()
    while True:
        request, fds = _receive(line)
        pid = _fork(supervisor)
        if pid == 0:
            line.detach()
            _become_another(request["environment"], fds)
            argv: Sequence[str] = request["argv"]
            return argv
        for fd in fds:
            os.close(fd)
        say(f"forked {pid}")


def go_on(argv: Sequence[str]) -> None:
    """Be the program `python -m MODULE ARGUMENTS` of a command line, and return at its end."""
    module_at = argv.index("-m") + 1
    sys.argv[1:] = argv[module_at + 1 :]
    runpy.run_module(argv[module_at], run_name="__main__", alter_sys=True)


def _load(modules: Sequence[str]) -> None:
    """Import all there is to import, or end the process."""
    asked = os.environ.get(NVML_CHECK)
    os.environ[NVML_CHECK] = "1"
    try:
        import numpy  # noqa: F401 (its pool of threads is made here, and knows how to be forked)

        before = _num_threads()
        from worker.rehearsal import rehearse

        rehearse()
        for module in modules:
            importlib.import_module(module)
        check_fit(before)
    except UnfitError as error:
        print(
            f"piecework worker: workers cannot be forked and are started anew when they die: {error}", file=sys.stderr
        )
        os._exit(UNFIT)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    del os.environ[NVML_CHECK]
    if asked is not None:
        os.environ[NVML_CHECK] = asked
    gc.collect()
    gc.freeze()  # a child's collections leave what it shares with others as it is


def check_fit(num_threads: int) -> None:
    """Check that a process forked from this one can work.

    Args:
        num_threads: that there may be: those that are known to bear it.

    Raises:
        UnfitError: it could hang or fail.
    """
    if (now := _num_threads()) > num_threads:
        raise UnfitError(f"something that was loaded has begun {now - num_threads} threads")
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        raise UnfitError("something that was loaded has initialised torch's CUDA")
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    if driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) == _CUDA_SUCCESS:
        raise UnfitError("something that was loaded has initialised the CUDA driver")


def _num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def _receive(line: socket.socket) -> tuple[Mapping[str, Any], Sequence[int]]:
    """The next request, and the descriptors with it. Ends the process when no more can come."""
    data, fds = b"", []
    while not data.endswith(b"\n"):
        try:
            part, more, _, _ = socket.recv_fds(line, _REQUEST_MAX, 2)
        except ConnectionError:
            part, more = b"", []
        if not part:
            os._exit(0)
        data += part
        fds += more
    return json.loads(data), fds


def _fork(supervisor: int) -> int:
    """A child of the supervisor that goes on from here: its process id, or 0 in that child."""
    read_end, write_end = os.pipe()
    between = os.fork()
    if between == 0:
        parent = os.getpid()
        pid = os.fork()
        if pid:
            os.write(write_end, str(pid).encode())
            os._exit(0)
        os.close(read_end)
        os.close(write_end)
        _die_with(supervisor, not_yet=parent)
        return 0
    os.close(write_end)
    pid = int(os.read(read_end, 32))
    os.close(read_end)
    os.waitpid(between, 0)
    return pid


def _die_with(supervisor: int, *, not_yet: int) -> None:
    """Wait until the supervisor has adopted this process, and ask the kernel to be killed with it."""
    while os.getppid() == not_yet:
        time.sleep(_LOOK_S)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != supervisor:
        os._exit(1)


def _become_another(environment: Mapping[str, str], fds: Sequence[int]) -> None:
    """Be a process as if it had been started with these variables and descriptors."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for fd, targets in zip(fds, ((LINE_FD,), (1, 2)), strict=False):
        for target in targets:
            os.dup2(fd, target)
        os.close(fd)
    os.environ.update(environment)
    if not os.read(LINE_FD, 64):  # the supervisor has given this one up
        os._exit(0)
