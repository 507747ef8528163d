"""When stalled work is announced again: at growing intervals, since a broker may keep every message that nobody takes.

Redis and Valkey drop an expired message only when a worker comes for it. So without workers a run is announced after
2, 4, 8 … s (`first_s`, doubled), at most every `longest_s`; anything that happens to it begins the row anew.

What a lost message costs: nothing happened to the work, or else it would be announced at once; so it has been announced
at intervals that double, and is announced again at the latest after as long as it has waited already, never later than
`longest_s` plus one pass. What a worker that died had taken is announced by the first pass that finds it free again.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta


@dataclass(frozen=True)
class Waiting:
    """Work that waits.

    Attributes:
        name: which.
        progress: differs once anything has happened to it.
        held: a worker has it already; it is reminded only if nothing has happened until the next pass.
    """

    name: str
    progress: Hashable
    held: bool = False


@dataclass(frozen=True)
class _Known:
    progress: Hashable
    due_at: datetime
    interval: timedelta


class Reminders:
    """Remembers, in the one process that sweeps, what was announced when; knows only what waited at the last pass."""

    def __init__(self, *, first_s: float, longest_s: float) -> None:
        self._first = timedelta(seconds=first_s)
        self._longest = timedelta(seconds=longest_s)
        self._known: dict[str, _Known] = {}

    def due(self, waiting: Sequence[Waiting], *, now: datetime, limit: int) -> list[str]:
        """The names of what is to be announced now, at most `limit`, those given first before others."""
        before, self._known = self._known, {}
        due: list[str] = []
        for work in waiting:
            known = before.get(work.name)
            seen = known is not None and known.progress == work.progress
            if known is None or not seen:
                known = _Known(work.progress, due_at=now, interval=self._first)
            if (seen or not work.held) and known.due_at <= now and len(due) < limit:
                due.append(work.name)
                longer = min(2 * known.interval, self._longest)
                known = replace(known, due_at=now + known.interval, interval=longer)
            self._known[work.name] = known
        return due
