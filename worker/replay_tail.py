"""What a death would make others compute again: a run's committed operations after its newest stored snapshot."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

RECENT = 1000


class ReplayTail:
    """Device time of the operations of one run's tail. On the engine's thread.

    Attributes:
        device_ns: of all of them.
    """

    def __init__(self) -> None:
        self.device_ns = 0
        self._operations: deque[tuple[int, int]] = deque()

    def add(self, seq: int, device_ns: int) -> None:
        """An operation has been committed, or replayed."""
        self._operations.append((seq, device_ns))
        self.device_ns += device_ns

    def shorten(self, snapshot_seq: int) -> None:
        """A snapshot holds the state after `snapshot_seq`."""
        while self._operations and self._operations[0][0] <= snapshot_seq:
            self.device_ns -= self._operations.popleft()[1]


class RecentPercentile:
    """The 95th percentile of the last `RECENT` values."""

    def __init__(self) -> None:
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []

    def add(self, value: int) -> None:
        """The next value; the oldest of too many is forgotten."""
        self._recent.append(value)
        insort(self._sorted, value)
        if len(self._recent) > RECENT:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]

    @property
    def p95(self) -> int:
        """The least value that is not exceeded by more than 5 % of them; 0 before the first."""
        return self._sorted[-(-95 * len(self._sorted) // 100) - 1] if self._sorted else 0
