"""The ledger: what accounts owe and have paid, entry by entry. Entries are appended, never edited or deleted.

A positive amount is owed by the account, a negative one is in its favour. The source of an entry says what it is for,
and a second entry for the same source is refused by the database: whatever is tried again is booked once.

What always holds: this module alone writes entries, and every amount is an integer of `money.SCALE`-ths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, insert, or_, select

from billing import budgets, money, owed
from billing.budgets import Budget
from billing.dimensions import Dimensions
from storage import billing_tables, rows
from storage.errors import RowNotFoundError

_table = billing_tables.ledger_entry


class EntryKind(StrEnum):
    """What an entry is."""

    CHARGE = "charge"
    CREDIT = "credit"
    TOP_UP = "topup"
    ADJUSTMENT = "adjustment"
    ROUNDING = "rounding"


@dataclass(frozen=True)
class NewEntry:
    """An entry to be appended.

    Attributes:
        source: what it is for; unique.
        units: the amount, in `money.SCALE`-ths.
        operation_id, storage_usage_id: what a charge is for.
        rate_card_id: what a charge was priced by.
        corrects_id: the entry that an adjustment corrects.
        invoice_id: only of a rounding, which is made for its invoice.
    """

    kind: EntryKind
    source: str
    dimensions: Dimensions
    units: int
    operation_id: int | None = None
    storage_usage_id: int | None = None
    rate_card_id: int | None = None
    corrects_id: int | None = None
    note: str | None = None
    invoice_id: int | None = None


@dataclass(frozen=True)
class Entry:
    """A row of the ledger; fields as those of `NewEntry`."""

    id: int
    kind: str
    source: str
    dimensions: Dimensions
    units: int
    created_at: datetime
    operation_id: int | None
    storage_usage_id: int | None
    rate_card_id: int | None
    corrects_id: int | None
    note: str | None
    invoice_id: int | None

    @property
    def amount(self) -> Decimal:
        """The amount in the currency."""
        return money.from_units(self.units)


def append(
    tx: Connection, entries: Sequence[NewEntry], *, now: datetime, ended: Mapping[int, str] | None = None
) -> Sequence[Budget]:
    """Append entries for sources that have none yet, and count them on the budgets that cover them.

    Args:
        ended: accounts, by their ids, of operations that have ended in this transaction: their holds are released.

    Returns:
        Those of the budgets which that concerns that pause what they cover once this is committed.

    Raises:
        IntegrityError: one of the sources has an entry already.
    """
    if entries:
        tx.execute(insert(_table), [_values(entry, now) for entry in entries])
    if not entries and not ended:
        return []
    return budgets.book(tx, [(entry.dimensions, entry.units) for entry in entries], now=now, ended=ended)


def append_once(tx: Connection, entry: NewEntry, *, now: datetime) -> bool:
    """Append an entry unless its source has one; returns whether it is new."""
    return append_missing(tx, [entry], now=now) == 1


def append_missing(tx: Connection, entries: Sequence[NewEntry], *, now: datetime) -> int:
    """Append those of the entries whose sources have none; returns how many that were."""
    new = [entry for entry in entries if rows.insert_if_absent(tx, _table, **_values(entry, now))]
    if new:
        budgets.book(tx, [(entry.dimensions, entry.units) for entry in new], now=now)
    return len(new)


def get(tx: Connection, source: str) -> Entry:
    """The entry for this source.

    Raises:
        RowNotFoundError: it has none.
    """
    found = find(tx, source)
    if found is None:
        raise RowNotFoundError("ledger entry for", source)
    return found


def find(tx: Connection, source: str) -> Entry | None:
    """The entry for this source, if it has one."""
    row = tx.execute(select(_table).where(_table.c.source == source)).one_or_none()
    return None if row is None else entry_of(row._mapping)


def list_entries(
    tx: Connection,
    account_id: str,
    *,
    kinds: Sequence[str] = (),
    run_id: str | None = None,
    project_id: str | None = None,
    since: datetime | None = None,
    before_id: int | None = None,
    limit: int,
) -> Sequence[Entry]:
    """An account's entries, newest first.

    Args:
        kinds: any of these; any at all if there are none.
        since: what was booked from then on.
        before_id: an entry that those that follow are wanted of.

    Raises:
        RowNotFoundError: the account has no entry `before_id`.
    """
    whose = _table.c.account_id if run_id is None else rows.without_index(_table.c.account_id)
    wanted = {"run_id": run_id, "project_id": project_id}
    conditions = [_table.c[name] == value for name, value in wanted.items() if value is not None]
    query = select(_table).where(whose == account_id, *conditions)
    if kinds:
        query = query.where(_table.c.kind.in_(kinds))
    if since is not None:
        query = query.where(_table.c.created_at >= since)
    if before_id is not None:
        of_account = select(_table.c.created_at).where(_table.c.account_id == account_id, _table.c.id == before_id)
        at = tx.execute(of_account).scalar_one_or_none()
        if at is None:
            raise RowNotFoundError("ledger entry", before_id)
        at_once = and_(_table.c.created_at == at, _table.c.id < before_id)
        query = query.where(or_(_table.c.created_at < at, at_once))
    newest = query.order_by(_table.c.created_at.desc(), _table.c.id.desc()).limit(limit)
    return [entry_of(row._mapping) for row in tx.execute(newest)]


def balance(tx: Connection, account_id: str, *, project_id: str | None = None, at: datetime | None = None) -> Decimal:
    """What an account (or one project of it) has in its favour; negative is owed.

    Args:
        at: as it was at this moment; None is now.
    """
    if project_id is None and at is None:
        return -money.from_units(owed.units(tx, account_id))
    wanted = [_table.c.account_id == account_id]
    if project_id is not None:
        wanted.append(_table.c.project_id == project_id)
    if at is not None:
        wanted.append(_table.c.created_at <= at)
    return -money.from_units(total_units(tx, *wanted))


def total_units(tx: Connection, *wanted: ColumnElement[bool]) -> int:
    """The sum of the entries that meet these conditions, however large it is."""
    high, low = tx.execute(select(*money.sum_columns(_table.c.amount)).where(*wanted)).one()
    return money.sum_of(high, low)


def entry_of(row: Any) -> Entry:
    """The entry that a row is."""
    values = dict(row)
    dimensions = Dimensions(**{name: values.pop(name) for name in Dimensions.__dataclass_fields__})
    return Entry(units=values.pop("amount"), dimensions=dimensions, **values)


def _values(entry: NewEntry, now: datetime) -> dict[str, Any]:
    values = {name: getattr(entry, name) for name in entry.__dataclass_fields__}
    return {
        **values.pop("dimensions").__dict__,
        "amount": values.pop("units"),
        **values,
        "kind": str(entry.kind),
        "created_at": now,
    }
