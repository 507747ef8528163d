"""A worker that waits for its turn: everything loaded, registered nowhere, holding nothing.

Its standard input is a socket whose other end the supervisor holds. A line on it means "begin", its end "nobody needs
you any more". What always holds: a worker that waits can be ended at any moment without a trace.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import traceback
from pathlib import Path

WHEN_TOLD = "--when-told"
WORKER_NAME, SPARE_NAME = "worker", "spare-worker"
"""As `ps` and `top` show them (Linux)."""
LINE_FD = 0
NICE = 5


def wait_for_turn() -> None:
    """Return when told to begin; ends the process on SIGTERM, or when nobody can tell it any more."""
    signal.signal(signal.SIGTERM, lambda _number, _frame: os._exit(0))
    if not select.select([LINE_FD], [], [], 0)[0]:
        _call_oneself(SPARE_NAME)
        loading = threading.Thread(target=_load, name="loading", daemon=True)
        loading.start()
        _await_line()
        loading.join()
    else:
        _await_line()
    _call_oneself(WORKER_NAME)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def say_ready() -> None:
    """Tell the supervisor that this worker takes work."""
    _say(b"ready\n")


def _await_line() -> None:
    try:
        told = os.read(LINE_FD, 64)
    except ConnectionError:
        told = b""
    if not told:
        os._exit(0)


def _load() -> None:
    """Import and try out what a worker needs, without competing with those that work.

    On Linux niceness is each thread's own: this thread keeps it to its end, and those begun later do not have it. (A
    process could make itself nice, but not take it back.)
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
    try:
        from worker.rehearsal import rehearse

        rehearse()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    _say(b"loaded\n")


def _say(word: bytes) -> None:
    try:
        os.write(LINE_FD, word)
    except OSError:
        print("the supervisor is gone", file=sys.stderr)  # the kernel is about to end this process, too


def _call_oneself(name: str) -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)
