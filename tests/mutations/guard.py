"""A guard, and how it is taken away: by replacing text of the sources, which must stand there exactly once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Change:
    """Text of one source file, and what is to stand in its place."""

    path: str
    old: str
    new: str

    def fault(self, root: Path) -> str | None:
        """Why it cannot be made, or None."""
        file = root / self.path
        found = file.read_text(encoding="utf-8").count(self.old) if file.is_file() else 0
        return None if found == 1 else f"{self.path} holds {self.old!r} {found} times, not once"


@dataclass(frozen=True)
class Guard:
    """One thing that a promise rests on.

    Attributes:
        name: what it is called in the table.
        keeps: what would happen without it.
        changes: what takes it away, all at once.
        red: tests, by node id without parameters, each of which must then fail by an assertion.
    """

    name: str
    keeps: str
    changes: tuple[Change, ...]
    red: tuple[str, ...]
