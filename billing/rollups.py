"""Usage rolled up by the hour, so that reading it does not take longer the more of it there is.

What always holds: a usage record is in its hour's rollup if, and only if, it is marked as rolled up. Rollups plus the
records that are not marked are all usage, at every moment and however late a record is committed. So that this holds,
one transaction at a time writes rollups.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, Select, delete, func, select, text, update
from sqlalchemy.dialects import postgresql, sqlite

from billing import charging, cloud_events, ledger, money, rate_cards
from billing.ledger import NewEntry
from billing.usage import COUNTS, Usage, UsageRow
from billing.usage_totals import HOUR, hour_of
from storage import billing_tables, tables
from storage.database import Database

BATCH = 2_000
"""Usage records of one transaction."""
WRITER_LOCK = 7_263_511_903  # any number, as long as only rollups use it

_record = billing_tables.usage_record
_rollup = billing_tables.usage_rollup
_entry = billing_tables.ledger_entry
_KEY = ("account_id", "session_id", "kind", "base_model", "device")
_KEY_OR_NONE: Mapping[str, Any] = {"project_id": "", "api_key_id": 0, "batch": "", "run_id": ""}
_SUMS = ("operations", *COUNTS, "charge")

Key = tuple[Any, ...]


@dataclass(frozen=True)
class _Part:
    """Records of a transaction, added up, and the charges that some of them lack."""

    sums: Mapping[Key, Mapping[str, int]]
    device_ns_by_worker: Mapping[str, int]
    uncharged: Sequence[NewEntry]


def roll_up(database: Database, *, pass_s: float, batch: int = BATCH) -> bool:
    """Add usage records to the rollups of their hours, a batch per transaction.

    Records from before the ledger get their charge, at the prices in force when they were used.

    Args:
        pass_s: how long to go on, in seconds.

    Returns:
        Whether nothing is left.
    """
    deadline = time.monotonic() + pass_s
    while True:
        with database.begin() as tx:
            taken = _roll_up_batch(tx, database, batch)
        if taken < batch:
            return True
        if time.monotonic() >= deadline:
            return False


def rebuild(database: Database, *, pass_s: float = float("inf")) -> None:
    """Make all rollups anew from the usage records; reading is exact all the while.

    An hour of an account is forgotten per transaction; what it is made of counts as not rolled up from then on.
    """
    with database.read() as tx:
        accounts = tx.execute(select(_record.c.account_id).union(select(_rollup.c.account_id))).scalars().all()
    for account_id in sorted(accounts):
        with database.read() as tx:
            hours = _hours_of(tx, account_id)
        for hour in hours:
            with database.begin() as tx:
                _forget(tx, account_id, hour)
    roll_up(database, pass_s=pass_s)


def _lock(tx: Connection) -> None:
    """Wait for others that write rollups: statements of two would see different moments, and count records twice."""
    if tx.dialect.name == "postgresql":
        tx.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": WRITER_LOCK})


def _roll_up_batch(tx: Connection, database: Database, batch: int) -> int:
    _lock(tx)
    rows = tx.execute(_waiting(database, batch)).all()
    if not rows:
        return 0
    tx.execute(update(_record).where(_record.c.id.in_([row.id for row in rows])).values(rolled_up=True, announced=True))
    part = _add_up(tx, rows)
    for key in sorted(part.sums):
        _add(tx, key, part.sums[key])
    now = database.now(tx)
    ledger.append_missing(tx, part.uncharged, now=now)
    for worker_id, device_ns in sorted(part.device_ns_by_worker.items()):  # after budgets, as whoever commits work
        _note_rolled_up(tx, worker_id, device_ns)
    cloud_events.announce_operations(tx, [row.id for row in rows if not row.announced], now=now)
    return len(rows)


def _waiting(database: Database, batch: int) -> Select[Any]:
    charge = select(_entry.c.amount).where(_entry.c.operation_id == _record.c.operation_id).scalar_subquery()
    query = select(_record, charge.label("charge")).where(billing_tables.NOT_ROLLED_UP)
    return database.for_update(query.order_by(_record.c.account_id, _record.c.finished_at).limit(batch))


def _add_up(tx: Connection, rows: Iterable[Row[Any]]) -> _Part:
    sums: dict[Key, dict[str, int]] = defaultdict(lambda: dict.fromkeys(_SUMS, 0))
    device_ns_by_worker: dict[str, int] = defaultdict(int)
    uncharged = []
    for row in rows:
        charge = row.charge
        if charge is None:
            entry = _late_charge(tx, row)
            uncharged.append(entry)
            charge = entry.units
        here = sums[_key_of(row)]
        here["operations"] += 1
        here["charge"] += charge
        for name in COUNTS:
            here[name] += row._mapping[name]
        device_ns_by_worker[row.worker_id] += row.device_ns
    return _Part(sums, device_ns_by_worker, uncharged)


def _late_charge(tx: Connection, row: Row[Any]) -> NewEntry:
    """The charge of a record from before the ledger."""
    used = Usage(**{name: row._mapping[name] for name in Usage.__dataclass_fields__})
    whom = {name: row._mapping[name] for name in UsageRow.__dataclass_fields__ if name != "usage"}
    dated = rate_cards.in_force(tx, row.account_id, at=row.finished_at)
    return replace(charging.entry_for(UsageRow(usage=used, **whom), dated), note=charging.BOOKED_LATE)


def _key_of(row: Row[Any]) -> Key:
    nullable = (none if (value := row._mapping[name]) is None else value for name, none in _KEY_OR_NONE.items())
    return (hour_of(row.finished_at), *(row._mapping[name] for name in _KEY), *nullable)


def _add(tx: Connection, key: Key, sums: Mapping[str, int]) -> None:
    names = ("hour", *_KEY, *_KEY_OR_NONE)
    dialect = sqlite if tx.dialect.name == "sqlite" else postgresql
    new = dialect.insert(_rollup).values(**dict(zip(names, key, strict=True)), **sums)
    added = {name: _rollup.c[name] + new.excluded[name] for name in _SUMS}
    charge = tx.execute(
        new.on_conflict_do_update(index_elements=[_rollup.c[name] for name in names], set_=added).returning(
            _rollup.c.charge
        )
    ).scalar_one()
    if not isinstance(charge, int):  # SQLite goes on in floating point where 64 bits do not suffice
        raise money.AmountError(f"the charges of one hour are too large to be added up: {charge}")


def _note_rolled_up(tx: Connection, worker_id: str, device_ns: int) -> None:
    table = tables.worker
    tx.execute(update(table).where(table.c.id == worker_id).values(rolled_up_ns=table.c.rolled_up_ns + device_ns))


def _hours_of(tx: Connection, account_id: str) -> Sequence[datetime]:
    first, last = tx.execute(
        select(func.min(_record.c.finished_at), func.max(_record.c.finished_at)).where(
            _record.c.account_id == account_id
        )
    ).one()
    rolled = tx.execute(select(_rollup.c.hour).where(_rollup.c.account_id == account_id).distinct()).scalars()
    hours = set(rolled)
    if first is not None:
        start = hour_of(first)
        hours |= {start + number * HOUR for number in range((hour_of(last) - start) // HOUR + 1)}
    return sorted(hours)


def _forget(tx: Connection, account_id: str, hour: datetime) -> None:
    _lock(tx)
    tx.execute(delete(_rollup).where(_rollup.c.account_id == account_id, _rollup.c.hour == hour))
    here = (_record.c.account_id == account_id, _record.c.finished_at >= hour, _record.c.finished_at < hour + HOUR)
    marked = tx.execute(
        update(_record)
        .where(*here, _record.c.rolled_up)
        .values(rolled_up=False)
        .returning(_record.c.worker_id, _record.c.device_ns)
    )
    device_ns_by_worker: dict[str, int] = defaultdict(int)
    for worker_id, device_ns in marked:
        device_ns_by_worker[worker_id] += device_ns
    for worker_id, device_ns in sorted(device_ns_by_worker.items()):
        _note_rolled_up(tx, worker_id, -device_ns)
