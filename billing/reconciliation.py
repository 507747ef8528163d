"""Holds what was billed and what was in vain against the clocks around the engines: nothing is billed twice or lost.

    drift = |busy - (billed + overhead + under way)| / busy

of every worker by itself. A worker tells all four in the transactions that bill, so what a kill loses is the step being
computed: it is neither billed nor counted as busy.

All four only add up from a worker's start on. What is recorded, and raises an alarm, is what has been added since the
record before: a fault is seen within the hour, however long the worker has run well, and told once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import structlog
from sqlalchemy import Connection, Select, delete, func, insert, select

from storage import billing_tables, tables
from storage.database import Database

log = structlog.get_logger()

DRIFT_MAX_PPM = 1000
"""More than 0.1 % is an alarm."""

BUSY_MIN_NS = 10**9
"""Workers that were busy for less are judged together: two clocks around a few short steps differ more. Together they
are recorded as soon as they were busy for so long."""

EVERY = timedelta(minutes=50)
"""Sooner than this it is not recorded again, however often it is asked for."""

ALARMS_MAX = 10
"""So many of the newest alarms are shown."""

_SHORT = "workers busy for less than a second"
_table = billing_tables.reconciliation
_recorded = billing_tables.reconciled_worker
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
    def drift_ppm(self) -> int:
        """Its amount in millionths of the busy time, rounded up."""
        return -(-abs(self.drift_ns) * 10**6 // self.busy_ns) if self.busy_ns else 0

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
        judged = [balance for balance in self.balances if balance.busy_ns >= BUSY_MIN_NS]
        return max(judged, key=lambda balance: balance.drift_ppm, default=None)

    @property
    def drift_ppm(self) -> int:
        """Of the worst."""
        return 0 if self.worst is None else self.worst.drift_ppm

    @property
    def alarm(self) -> bool:
        """Whether it is more than it may be."""
        return self.drift_ppm > DRIFT_MAX_PPM

    def total(self, name: str) -> int:
        """The sum of one of the properties in nanoseconds over all workers."""
        return sum(getattr(balance, name) for balance in self.balances)


@dataclass(frozen=True)
class Unrecorded:
    """What was added since the record before.

    Attributes:
        added: of the workers that were busy for long enough to tell.
        until: what stands of each of them, where the next record begins.
    """

    added: Reconciliation
    until: Sequence[Balance]


@dataclass(frozen=True)
class Alarm:
    """A record that was off by more than it may be."""

    created_at: datetime
    worker_id: str
    drift_ppm: int


def reconcile(tx: Connection) -> Reconciliation:
    """Read every worker's balance since its start, in one statement, so that it is that of one moment."""
    long, short = _by_length(_balances(tx))
    return Reconciliation([*long, _together(short)] if short else long)


def unrecorded(tx: Connection) -> Unrecorded:
    """Read what was added since the record before."""
    zero = Balance("", *(0 for _ in _NS))
    columns = (_recorded.c.worker_id, *(_recorded.c[name] for name in _NS))
    before = {row.worker_id: Balance(*row) for row in tx.execute(select(*columns))}
    standing = {balance.worker_id: balance for balance in _balances(tx)}
    added = [balance.since(before.get(id_, zero)) for id_, balance in standing.items()]
    judged, short = _by_length([balance for balance in added if balance.busy_ns or balance.drift_ns])
    until = [standing[balance.worker_id] for balance in judged]
    if (together := _together(short)).busy_ns >= BUSY_MIN_NS:
        judged, until = [*judged, together], [*until, *(standing[balance.worker_id] for balance in short)]
    return Unrecorded(Reconciliation(judged), until)


def record(tx: Connection, found: Unrecorded, *, now: datetime) -> None:
    """Keep what was found, and say it aloud if it is too much."""
    added = found.added
    tx.execute(
        insert(_table).values(
            created_at=now,
            num_workers=len(found.until),
            busy_ns=added.total("busy_ns"),
            billed_ns=added.total("billed_ns"),
            overhead_ns=added.total("overhead_ns"),
            drift_ppm=added.drift_ppm,
            worst_worker=None if added.worst is None else added.worst.worker_id,
            alarm=added.alarm,
        )
    )
    for balance in found.until:
        tx.execute(delete(_recorded).where(_recorded.c.worker_id == balance.worker_id))
    if found.until:
        tx.execute(insert(_recorded), [dict(balance.__dict__) for balance in found.until])
    if added.alarm and added.worst is not None:
        log.error("device_time_drifts", worker=added.worst.worker_id, ns=added.worst.drift_ns, ppm=added.drift_ppm)


def record_due(database: Database) -> None:
    """Reconcile and keep what is found, unless that was done within the hour."""
    newest = select(_table.c.created_at).order_by(_table.c.id.desc())
    with database.read() as tx:
        found = unrecorded(tx) if _is_due(tx, newest, database.now(tx)) else None
    if found is None:
        return
    with database.begin() as tx:
        now = database.now(tx)
        if _is_due(tx, newest, now):  # nobody else has recorded it meanwhile
            record(tx, found, now=now)


def alarms(tx: Connection) -> Sequence[Alarm]:
    """The newest records that were off by too much, newest first."""
    query = select(_table.c.created_at, _table.c.worst_worker, _table.c.drift_ppm).where(_table.c.alarm)
    return [
        Alarm(created_at, worker_id or "a worker", drift_ppm)  # records of before migration 0009 name none
        for created_at, worker_id, drift_ppm in tx.execute(query.order_by(_table.c.id.desc()).limit(ALARMS_MAX))
    ]


def _balances(tx: Connection) -> Sequence[Balance]:
    worker, usage = tables.worker.c, billing_tables.usage_record.c
    billed = (
        select(func.coalesce(func.sum(usage.device_ns), 0))
        .where(usage.worker_id == worker.id, billing_tables.NOT_ROLLED_UP)
        .correlate(tables.worker)
        .scalar_subquery()
    )
    query = select(worker.id, worker.busy_ns, (worker.rolled_up_ns + billed), worker.overhead_ns, worker.under_way_ns)
    return [Balance(row[0], *(int(number) for number in row[1:])) for row in tx.execute(query.order_by(worker.id))]


def _by_length(balances: Sequence[Balance]) -> tuple[Sequence[Balance], Sequence[Balance]]:
    """Those of workers that were busy for long enough to be judged by themselves, and the others."""
    long = [balance for balance in balances if balance.busy_ns >= BUSY_MIN_NS]
    return long, [balance for balance in balances if balance.busy_ns < BUSY_MIN_NS]


def _together(balances: Sequence[Balance]) -> Balance:
    return Balance(_SHORT, *(sum(getattr(balance, name) for balance in balances) for name in _NS))


def _is_due(tx: Connection, newest: Select[Any], now: datetime) -> bool:
    before: datetime | None = tx.execute(newest.limit(1)).scalar_one_or_none()
    return before is None or now - before >= EVERY
