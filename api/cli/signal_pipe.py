"""Signals as bytes in a pipe, for a loop that selects: none is lost, and none interrupts anything."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextlib.contextmanager
def signal_pipe() -> Iterator[int]:
    """The end to read from, non-blocking: one byte for each of `STOP_SIGNALS` and SIGCHLD, while the block runs."""
    read_fd, write_fd = os.pipe()
    for fd in (read_fd, write_fd):
        os.set_blocking(fd, False)
    taken = {*STOP_SIGNALS, signal.SIGCHLD}
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # as nohup sets it
        taken.remove(signal.SIGHUP)
    previous = {number: signal.signal(number, _ignore) for number in taken}
    previous_fd = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    try:
        yield read_fd
    finally:
        signal.set_wakeup_fd(previous_fd)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(read_fd)
        os.close(write_fd)


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """The pipe carries the signal; a handler must exist for that."""
