"""What a part under a supervisor has of it: its standard input is a socket, whose other end the supervisor holds."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

SUPERVISED = "--supervised"
API_NAME, WORKER_NAME = "api", "worker"
"""As `ps` and `top` show them (Linux)."""
LINE_FD = 0


def say(word: str) -> None:
    """Tell the supervisor something; a supervisor that is gone is about to end this process, too."""
    try:
        os.write(LINE_FD, f"{word}\n".encode())
    except OSError:
        print("the supervisor is gone", file=sys.stderr)


def say_ready() -> None:
    """Tell the supervisor that work is taken."""
    say("ready")


def call_oneself(name: str) -> None:
    """Show another name than `python`, where there is such a thing."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)
