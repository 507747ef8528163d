"""The log file of one child: bounded, and watched for lines that a person should see at once."""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Callable
from pathlib import Path

BYTES_MAX = 10 * 2**20
NUM_OLD = 2
TAIL_LINES = 15
LINE_BYTES_MAX = 8192
_PLAIN_MARKS = ("ERROR", "CRITICAL", "[error", "[critical")


class ChildLog:
    """What a child says, appended to `path`; when that is full it becomes `.1`, and the oldest goes."""

    def __init__(self, path: Path, on_error: Callable[[str], None], *, bytes_max: int = BYTES_MAX) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._on_error = on_error
        self._bytes_max = bytes_max
        self._file = path.open("ab", buffering=0)
        self._partial = b""

    def write(self, data: bytes) -> None:
        """Append, and report the error lines in it."""
        if not data:
            return
        with contextlib.suppress(OSError, ValueError):  # a full disk ends no service; what is said now is lost
            if self._file.closed:
                self._file = self.path.open("ab", buffering=0)
            self._file.write(data)
            if self._file.tell() >= self._bytes_max:
                self._rotate()
        *lines, self._partial = (self._partial + data).split(b"\n")
        self._partial = self._partial[-LINE_BYTES_MAX:]
        for line in lines:
            self._take(line.decode(errors="replace").rstrip())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _take(self, line: str) -> None:
        if line:
            self.tail.append(line)
            if is_error(line):
                self._on_error(line)

    def _rotate(self) -> None:
        self._file.close()
        for number in range(NUM_OLD, 0, -1):
            older = self.path.with_name(f"{self.path.name}.{number}")
            newer = self.path if number == 1 else self.path.with_name(f"{self.path.name}.{number - 1}")
            if newer.exists():
                newer.replace(older)
        self._file = self.path.open("ab", buffering=0)


def is_error(line: str) -> bool:
    """Whether a log line reports an error: by its level where it is JSON, else by how it begins."""
    if line.startswith("{"):
        try:
            level = json.loads(line).get("level", "")
        except ValueError:
            return False
        return str(level).lower() in {"error", "critical"}
    return any(mark in line[:60] for mark in _PLAIN_MARKS)
