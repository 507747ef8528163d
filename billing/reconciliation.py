"""Holds what was billed and what was in vain against the clocks around the engines: nothing is billed twice or lost.

    drift = |busy - (billed + overhead + under way)| / busy

of every worker by itself; where more has been billed or in vain than it was busy, over that. A worker tells all four in
the transactions that bill, so what a kill loses is the step being computed: it is neither billed nor counted as busy.

All four only add up from a worker's start on. What is recorded, and raises an alarm, is what has been added since the
record before: a fault is seen within the hour, however long the worker has run well, and told once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog
from sqlalchemy import Connection, delete, func, insert, select, text

from storage import billing_tables, tables
from storage.database import Database, after_commit

log = structlog.get_logger()

DRIFT_MAX_PPM = 1000
"""More than 0.1 % is an alarm."""

BUSY_MIN_NS = 10**9
"""Workers that were busy for less are not judged by themselves: two clocks around a few short steps differ more. One
that runs is recorded once it has done so much; those that have stopped, together, as soon as that makes so much."""

EVERY = timedelta(minutes=50)
"""Sooner than this it is not recorded again, however often it is asked for."""

ALARMS_MAX = 10
"""So many of the newest alarms are shown."""

TOGETHER = "workers hardly busy, together"
"""Stands for the worker where several are judged as one."""

_IDS_PER_QUERY = 500
_table = billing_tables.reconciliation
_recorded = billing_tables.reconciled_worker
_alarm = billing_tables.drift_alarm
_NS = ("busy_ns", "billed_ns", "overhead_ns", "under_way_ns")


@dataclass(frozen=True)
class Balance:
    """Device time of one worker, in nanoseconds; several that were hardly busy are one."""

    worker_id: str
    busy_ns: int
    billed_ns: int
    overhead_ns: int
    under_way_ns: int

    @property
    def drift_ns(self) -> int:
        """Busy time that is in none of the others; negative if they are more."""
        return self.busy_ns - self.billed_ns - self.overhead_ns - self.under_way_ns

    @property
    def judged_by_ns(self) -> int:
        """What drift is held against: the busy time, or what it ought to be where that is more."""
        return max(self.busy_ns, self.billed_ns + self.overhead_ns, abs(self.drift_ns))

    @property
    def drift_ppm(self) -> int:
        """Its amount in millionths of that, rounded up."""
        return -(-abs(self.drift_ns) * 10**6 // self.judged_by_ns) if self.judged_by_ns else 0

    @property
    def is_long(self) -> bool:
        """Whether it is of so much that it can be judged by itself."""
        return self.judged_by_ns >= BUSY_MIN_NS

    @property
    def alarm(self) -> bool:
        """Whether it is off by more than it may be."""
        return self.is_long and self.drift_ppm > DRIFT_MAX_PPM

    def since(self, before: Balance) -> Balance:
        """What was added to an earlier one; less may be under way, so that one of the four can be negative."""
        return Balance(self.worker_id, *(getattr(self, name) - getattr(before, name) for name in _NS))


@dataclass(frozen=True)
class Reconciliation:
    """What holding them against each other has shown."""

    balances: Sequence[Balance]

    @property
    def worst(self) -> Balance | None:
        """The one that is furthest off, of those busy for long enough to tell."""
        judged = [balance for balance in self.balances if balance.is_long]
        return max(judged, key=lambda balance: balance.drift_ppm, default=None)

    @property
    def drift_ppm(self) -> int:
        """Of the worst."""
        return 0 if self.worst is None else self.worst.drift_ppm

    @property
    def alarm(self) -> bool:
        """Whether it is more than it may be."""
        return any(balance.alarm for balance in self.balances)

    def total(self, name: str) -> int:
        """The sum of one of the properties in nanoseconds over all workers."""
        return sum(getattr(balance, name) for balance in self.balances)


@dataclass(frozen=True)
class Unrecorded:
    """What was added since the record before.

    Attributes:
        before: that record, if there is one: its number and time.
        added: of the workers of which there is enough to tell.
        until: what stands of each of them, where the next record begins.
    """

    before: tuple[int, datetime] | None
    added: Reconciliation
    until: Sequence[Balance]


@dataclass(frozen=True)
class Alarm:
    """A worker was off by more than it may be, in what was recorded at that time.

    Attributes:
        worker_id: None for all that were hardly busy, together.
    """

    created_at: datetime
    worker_id: str | None
    busy_ns: int
    drift_ns: int
    drift_ppm: int


def reconcile(tx: Connection) -> Reconciliation:
    """Read every worker's balance since its start, in one statement, so that it is that of one moment."""
    long, short = _by_length([balance for balance, _ in _balances(tx)])
    return Reconciliation([*long, _together(short)] if short else long)


def unrecorded(tx: Connection) -> Unrecorded:
    """Read what was added since the record before."""
    newest = _newest(tx)  # before all else: what is recorded meanwhile makes this void
    columns = (_recorded.c.worker_id, *(_recorded.c[name] for name in _NS))
    before = {row.worker_id: Balance(*row) for row in tx.execute(select(*columns))}
    every = _balances(tx)
    standing = {balance.worker_id: balance for balance, _ in every}
    stopped = {balance.worker_id for balance, has_stopped in every if has_stopped}
    zero = Balance("", *(0 for _ in _NS))
    added = [balance.since(before.get(id_, zero)) for id_, balance in standing.items()]
    judged, short = _by_length([balance for balance in added if balance.judged_by_ns])
    short = [balance for balance in short if balance.worker_id in stopped]
    until = [standing[balance.worker_id] for balance in judged]
    if (together := _together(short)).is_long:
        judged, until = [*judged, together], [*until, *(standing[balance.worker_id] for balance in short)]
    return Unrecorded(newest, Reconciliation(judged), until)


def record(tx: Connection, found: Unrecorded, *, now: datetime) -> bool:
    """Keep what was found, and say aloud of which workers it is too much.

    Returns:
        Whether it was kept: not if another record has been made since it was read.
    """
    if tx.dialect.name == "postgresql":
        tx.execute(text("LOCK TABLE reconciliation IN SHARE ROW EXCLUSIVE MODE"))  # one at a time
    if _newest(tx) != found.before:
        return False
    added = found.added
    values = {
        "num_workers": len(found.until),
        "busy_ns": added.total("busy_ns"),
        "billed_ns": added.total("billed_ns"),
        "overhead_ns": added.total("overhead_ns"),
        "drift_ppm": added.drift_ppm,
        "alarm": added.alarm,
    }
    made = tx.execute(insert(_table).values(created_at=now, **values).returning(_table.c.id)).scalar_one()
    ids = [balance.worker_id for balance in found.until]
    for begin in range(0, len(ids), _IDS_PER_QUERY):
        tx.execute(delete(_recorded).where(_recorded.c.worker_id.in_(ids[begin : begin + _IDS_PER_QUERY])))
    if found.until:
        tx.execute(insert(_recorded), [dict(balance.__dict__) for balance in found.until])
    for balance in added.balances:
        if balance.alarm:
            _raise_alarm(tx, made, balance)
    return True


def record_due(database: Database) -> None:
    """Reconcile and keep what is found, unless that was done within the hour."""
    with database.read() as tx:
        found = unrecorded(tx)
        is_due = found.before is None or database.now(tx) - found.before[1] >= EVERY
    if is_due:
        with database.begin() as tx:
            record(tx, found, now=database.now(tx))


def alarms(tx: Connection) -> Sequence[Alarm]:
    """The newest ones, newest first."""
    columns = (_table.c.created_at, _alarm.c.worker_id, _alarm.c.busy_ns, _alarm.c.drift_ns, _alarm.c.drift_ppm)
    query = select(*columns).join(_table, _table.c.id == _alarm.c.reconciliation_id)
    return [Alarm(*row) for row in tx.execute(query.order_by(_alarm.c.id.desc()).limit(ALARMS_MAX))]


def _raise_alarm(tx: Connection, reconciliation_id: int, balance: Balance) -> None:
    facts = {"busy_ns": balance.busy_ns, "drift_ns": balance.drift_ns, "drift_ppm": balance.drift_ppm}
    worker_id = None if balance.worker_id == TOGETHER else balance.worker_id
    tx.execute(insert(_alarm).values(reconciliation_id=reconciliation_id, worker_id=worker_id, **facts))
    told = {"worker": balance.worker_id, "ns": balance.drift_ns, "ppm": balance.drift_ppm}
    after_commit(tx, lambda: log.error("device_time_drifts", **told))


def _newest(tx: Connection) -> tuple[int, datetime] | None:
    """Number and time of the newest record."""
    row = tx.execute(select(_table.c.id, _table.c.created_at).order_by(_table.c.id.desc()).limit(1)).one_or_none()
    return None if row is None else (row.id, row.created_at)


def _balances(tx: Connection) -> Sequence[tuple[Balance, bool]]:
    """Of every worker, and whether it has stopped."""
    worker, usage = tables.worker.c, billing_tables.usage_record.c
    billed = (
        select(func.coalesce(func.sum(usage.device_ns), 0))
        .where(usage.worker_id == worker.id, billing_tables.NOT_ROLLED_UP)
        .correlate(tables.worker)
        .scalar_subquery()
    )
    sums = (worker.busy_ns, worker.rolled_up_ns + billed, worker.overhead_ns, worker.under_way_ns)
    query = select(worker.id, worker.stopped_at.is_not(None), *sums).order_by(worker.id)
    return [
        (Balance(worker_id, *(int(number) for number in numbers)), bool(has_stopped))
        for worker_id, has_stopped, *numbers in tx.execute(query)
    ]


def _by_length(balances: Sequence[Balance]) -> tuple[Sequence[Balance], Sequence[Balance]]:
    """Those that can be judged by themselves, and the others."""
    return [one for one in balances if one.is_long], [one for one in balances if not one.is_long]


def _together(balances: Sequence[Balance]) -> Balance:
    return Balance(TOGETHER, *(sum(getattr(balance, name) for balance in balances) for name in _NS))
