"""How much waits for execution, and whether more may be taken: operations and bytes of payload, per account and in all.

The journal is counted about once a second, when somebody submits; what this process has accepted since is added, what
it is about to accept too. So a submission costs a look into memory, and never waits for a count that another thread is
making.

Beyond the limits samples are refused; training operations only beyond `queued_training_factor` times the limits, so
that samples alone never keep a run from training; one that operations accepted before wait for only beyond twice that,
since refused it would keep them from running. Whoever is below a limit may submit one more, whatever its size.

What always holds: one process alone never goes further over a limit than by that one payload. Several api processes do
not see what the others accept until they count again: at worst each fills the room that it saw, so with P of them up to
P times the limit, and no more than they can accept in `COUNT_EVERY_S`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from jobs.operations import Kind
from jobs.settings import JobsSettings
from storage import journal
from storage.database import Database
from storage.journal import Amount

COUNT_EVERY_S = 1.0
COUNT_SHARE_MAX = 0.05
"""So much of the time may be spent counting: a count that takes long is made less often."""
NOTHING = Amount(0, 0)
THIS_ACCOUNT, THE_SERVICE = "this account", "the service"
WAITED_FOR_FACTOR = 2.0
RETRY_AFTER_SAMPLE_S = 1
RETRY_AFTER_TRAINING_S = 5
RETRY_AFTER_CREATION_S = 30
"""The SDK repeats what makes a run only ten times, so it is asked to wait longer each time."""


class BacklogFullError(Exception):
    """Too much waits for execution: submit again later.

    Attributes:
        retry_after_s: when to try again.
    """

    def __init__(self, whose: str, waiting: int, limit: int, unit: str, *, retry_after_s: int) -> None:
        super().__init__(
            f"{whose} has {waiting} {unit} waiting for execution, and the limit is {limit}; "
            f"wait for some to be done, and try again in {retry_after_s} s"
            if whose == THIS_ACCOUNT
            else f"{whose} has too many {unit} waiting for execution; try again in {retry_after_s} s"
        )
        self.retry_after_s = retry_after_s


class Tally:
    """Amounts by account, and their sum."""

    def __init__(self, by_account: Mapping[str, Amount] | None = None) -> None:
        self._by_account = dict(by_account or {})
        self.total = sum(self._by_account.values(), NOTHING)

    def add(self, account_id: str, amount: Amount) -> None:
        """Add to an account; an account that comes to nothing is forgotten."""
        self.total += amount
        self._by_account[account_id] = self.of(account_id) + amount
        if self._by_account[account_id] == NOTHING:
            del self._by_account[account_id]

    def add_all(self, other: Tally) -> None:
        """Add what another holds."""
        for account_id, amount in other._by_account.items():
            self.add(account_id, amount)

    def of(self, account_id: str) -> Amount:
        """What an account has."""
        return self._by_account.get(account_id, NOTHING)


class Backlog:
    """Counts what waits, and refuses what is too much.

    Args:
        count: what waits now, by account.
    """

    def __init__(self, count: Callable[[], Mapping[str, Amount]], settings: JobsSettings) -> None:
        self._count = count
        self._settings = settings
        self._lock = threading.Lock()
        self._counting = threading.Lock()
        self._count_at = time.monotonic()
        self._counted: Tally | None = None
        self._before = Tally()  # accepted here before a count that is being made began
        self._since = Tally()  # accepted here since the last count began
        self._under_way = Tally()  # about to be accepted here

    @classmethod
    def of(cls, database: Database, settings: JobsSettings) -> Backlog:
        """The backlog in a database."""

        def count() -> Mapping[str, Amount]:
            with database.read() as tx:
                return journal.open_by_account(tx)

        return cls(count, settings)

    @contextlib.contextmanager
    def place(self, account_id: str, kind: Kind, payload_bytes: int, *, waited_for: bool = False) -> Iterator[None]:
        """Hold a place for an operation while it is written down, in the block.

        Args:
            waited_for: whether operations that were accepted before cannot run without it.

        Raises:
            BacklogFullError: too much waits.
        """
        self._count_if_due()
        amount = Amount(1, payload_bytes)
        with self._lock:
            self._check(account_id, kind, waited_for=waited_for)
            self._under_way.add(account_id, amount)
        accepted = False
        try:
            yield
            accepted = True
        finally:
            with self._lock:
                self._under_way.add(account_id, -amount)
                if accepted:
                    self._since.add(account_id, amount)

    def _check(self, account_id: str, kind: Kind, *, waited_for: bool) -> None:
        settings = self._settings
        factor = 1.0 if kind is Kind.SAMPLE else settings.queued_training_factor
        factor *= WAITED_FOR_FACTOR if waited_for else 1.0
        tallies = [self._counted or Tally(), self._before, self._since, self._under_way]
        mine = sum((tally.of(account_id) for tally in tallies), NOTHING)
        everyone = sum((tally.total for tally in tallies), NOTHING)
        limits: tuple[tuple[str, int, int, Literal["operations", "bytes"]], ...] = (
            (THIS_ACCOUNT, mine.operations, settings.queued_max_per_account, "operations"),
            (THIS_ACCOUNT, mine.payload_bytes, settings.queued_bytes_max_per_account, "bytes"),
            (THE_SERVICE, everyone.operations, settings.queued_max, "operations"),
            (THE_SERVICE, everyone.payload_bytes, settings.queued_bytes_max, "bytes"),
        )
        for whose, waiting, limit, unit in limits:
            bound = int(limit * factor)
            if waiting >= bound:
                raise BacklogFullError(whose, waiting, bound, unit, retry_after_s=_retry_after_s(kind))

    def _count_if_due(self) -> None:
        """Count, unless another thread does; only the very first count is waited for."""
        if self._counted is not None and time.monotonic() < self._count_at:
            return
        if not self._counting.acquire(blocking=self._counted is None):
            return
        try:
            if self._counted is None or time.monotonic() >= self._count_at:
                self._count_anew()
        finally:
            self._counting.release()

    def _count_anew(self) -> None:
        with self._lock:
            self._before, self._since = self._since, Tally()
        begun = time.monotonic()
        try:
            counted = Tally(self._count())
        except BaseException:
            with self._lock:
                self._since.add_all(self._before)
                self._before = Tally()
            raise
        took_s = time.monotonic() - begun
        with self._lock:
            self._counted, self._before = counted, Tally()
            self._count_at = time.monotonic() + max(COUNT_EVERY_S, took_s / COUNT_SHARE_MAX)


def _retry_after_s(kind: Kind) -> int:
    if kind is Kind.SAMPLE:
        return RETRY_AFTER_SAMPLE_S
    return RETRY_AFTER_CREATION_S if kind is Kind.CREATE_MODEL else RETRY_AFTER_TRAINING_S
