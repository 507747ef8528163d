"""Holds what was billed and what was in vain against the clocks around the engines: nothing is billed twice or lost.

    drift = |busy - (billed + overhead + under way)| / busy

of every worker by itself. A worker tells all four in the transactions that bill, so what a kill loses is the step being
computed: it is neither billed nor counted as busy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import structlog
from sqlalchemy import Connection, Select, func, insert, select

from storage import billing_tables, tables
from storage.database import Database

log = structlog.get_logger()

DRIFT_MAX_PPM = 1000
"""More than 0.1 % is an alarm."""

BUSY_MIN_NS = 10**9
"""Workers that were busy for less are judged together: two clocks around a few short steps differ more."""

EVERY = timedelta(minutes=50)
"""Sooner than this it is not recorded again, however often it is asked for."""

_SHORT = "workers busy for less than a second"


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


def reconcile(tx: Connection) -> Reconciliation:
    """Read every worker's balance, in one statement, so that it is that of one moment."""
    worker, usage = tables.worker.c, billing_tables.usage_record.c
    billed = (
        select(func.coalesce(func.sum(usage.device_ns), 0))
        .where(usage.worker_id == worker.id, billing_tables.NOT_ROLLED_UP)
        .correlate(tables.worker)
        .scalar_subquery()
    )
    query = select(worker.id, worker.busy_ns, (worker.rolled_up_ns + billed), worker.overhead_ns, worker.under_way_ns)
    every = [Balance(row[0], *(int(number) for number in row[1:])) for row in tx.execute(query.order_by(worker.id))]
    long = [balance for balance in every if balance.busy_ns >= BUSY_MIN_NS]
    short = [balance for balance in every if balance.busy_ns < BUSY_MIN_NS]
    names = ("busy_ns", "billed_ns", "overhead_ns", "under_way_ns")
    together = Balance(_SHORT, *(sum(getattr(balance, name) for balance in short) for name in names))
    return Reconciliation([*long, together] if short else long)


def record(tx: Connection, found: Reconciliation, *, now: datetime) -> None:
    """Keep what was found, and say it aloud if it is too much."""
    tx.execute(
        insert(billing_tables.reconciliation).values(
            created_at=now,
            num_workers=len(found.balances),
            busy_ns=found.total("busy_ns"),
            billed_ns=found.total("billed_ns"),
            overhead_ns=found.total("overhead_ns"),
            drift_ppm=found.drift_ppm,
            alarm=found.alarm,
        )
    )
    if found.alarm and found.worst is not None:
        log.error("device_time_drifts", worker=found.worst.worker_id, ns=found.worst.drift_ns, ppm=found.drift_ppm)


def record_due(database: Database) -> None:
    """Reconcile and keep what is found, unless that was done within the hour."""
    newest = select(billing_tables.reconciliation.c.created_at).order_by(billing_tables.reconciliation.c.id.desc())
    with database.read() as tx:
        found = reconcile(tx) if _is_due(tx, newest, database.now(tx)) else None
    if found is None:
        return
    with database.begin() as tx:
        now = database.now(tx)
        if _is_due(tx, newest, now):  # nobody else has recorded it meanwhile
            record(tx, found, now=now)


def _is_due(tx: Connection, newest: Select[Any], now: datetime) -> bool:
    before: datetime | None = tx.execute(newest.limit(1)).scalar_one_or_none()
    return before is None or now - before >= EVERY
