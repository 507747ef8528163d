"""What a worker has done, told to the database: in the transaction that bills it, so that the two never disagree.

    busy = billed + overhead + under way

Busy time is what the clock has counted around every step (`engine/timing.py`); overhead is what failed, was replayed or
was discarded; under way is what samples have used that are not done yet. Reports are numbered in the worker's row: when
the database does not say whether a transaction took effect, the number does.

On the engine's thread alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sqlalchemy import Connection

from storage import workers
from storage.workers import Work
from worker.engine.timing import DeviceClock


@dataclass(frozen=True)
class Report:
    """One report of work, by its number."""

    number: int
    work: Work


class WorkMeter:
    """Counts what has not been told yet.

    Attributes:
        clock: counts busy time.
        work: what was done since the last report; busy time is added when it is told.
        under_way_ns: gives device time of what is not done yet, in nanoseconds.
        tail_p95_ns: gives the device time that a death would have others replay, in nanoseconds.
    """

    def __init__(self, worker_id: str, clock: DeviceClock) -> None:
        self._worker_id = worker_id
        self.clock = clock
        self.work = Work()
        self.under_way_ns: Callable[[], int] = lambda: 0
        self.tail_p95_ns: Callable[[], int] = lambda: 0
        self._busy_told_ns = 0
        self._in_doubt: Report | None = None
        self._written: Report | None = None

    def waste(self, device_ns: int) -> None:
        """Count device time that nobody is billed for."""
        self.work.overhead_ns += device_ns

    @property
    def has_news(self) -> bool:
        """Whether there is anything to tell."""
        return self._in_doubt is not None or self.work != Work() or self.clock.busy_ns != self._busy_told_ns

    def took_effect(self, tx: Connection) -> bool:
        """Whether the transaction that was written last, and not known to have taken effect, has done so.

        Nothing is locked: runs are, before a worker's row. Should it take effect after this, `write` finds out.
        """
        return self._written is not None and workers.work_number(tx, self._worker_id) >= self._written.number

    def write(self, tx: Connection, *, unbilled_ns: int = 0) -> None:
        """Tell what is new, in a transaction; then call `told`, or `doubt` if it is not known to have taken effect.

        Args:
            unbilled_ns: device time of what this very transaction found failed or lost.
        """
        number = workers.locked_work_number(tx, self._worker_id)
        if self._written is not None and number >= self._written.number:
            return  # an earlier try of this very transaction took effect
        work = replace(self.work, busy_ns=self.clock.busy_ns - self._busy_told_ns)
        work.overhead_ns += unbilled_ns
        if self._in_doubt is not None and number < self._in_doubt.number:
            work += self._in_doubt.work
        self._written = Report(number + 1, work)
        workers.add_work(
            tx,
            self._worker_id,
            work,
            number=number + 1,
            under_way_ns=self.under_way_ns(),
            tail_p95_ns=self.tail_p95_ns(),
        )

    def told(self) -> None:
        """What was written is in the database."""
        self._in_doubt, self._written, self.work = None, None, Work()
        self._busy_told_ns = self.clock.busy_ns

    def doubt(self) -> None:
        """It is not known whether what was written is in the database: the next report finds out."""
        if self._written is not None:
            in_doubt = self._written
            self.told()
            self._in_doubt = in_doubt
