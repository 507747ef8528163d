"""Usage line by line, with what it cost, for other programs: operations and, by the hour, storage.

Read in pages of short transactions, in an order that stays: by account, then operations before storage, then time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, Table, and_, func, literal, null, or_, select

from billing import money, rate_cards
from billing.usage import COUNTS
from storage import billing_tables, tables
from storage.database import Database

PAGE = 2_000

_record = billing_tables.usage_record
_storage = billing_tables.storage_usage
_entry = billing_tables.ledger_entry


@dataclass(frozen=True)
class UsageLine:
    """What one operation used, or what a run kept in an hour, and its charge.

    Attributes:
        id: `usage-N` or `storage-N`, by the number of its row; the same for ever.
        at: when the operation ended, or when the hour began.
        kind: of the operation, or `checkpoint_storage` or `state_storage`.
        charge: in `money.SCALE`-ths; None if it has not been charged yet, 0 where storage is free.
    """

    id: str
    at: datetime
    account_id: str
    project_id: str | None
    api_key_id: int | None
    session_id: str
    batch: str | None
    run_id: str | None
    kind: str
    base_model: str
    device: str | None
    device_ns: int
    tokens_trained: int
    tokens_prefilled: int
    tokens_cached: int
    tokens_sampled: int
    byte_seconds: int
    charge: int | None
    currency: str

    @property
    def charge_text(self) -> str | None:
        """The charge in the currency, as digits."""
        return None if self.charge is None else money.plain(money.from_units(self.charge))


def of_records(tx: Connection, record_ids: Collection[int]) -> Sequence[UsageLine]:
    """The lines of these usage records, in the order in which they were recorded."""
    return _of_numbers(tx, _OPERATIONS, record_ids)


def of_storage(tx: Connection, storage_usage_ids: Collection[int]) -> Sequence[UsageLine]:
    """The lines of these rows of storage, in the order in which they were recorded."""
    return _of_numbers(tx, _STORAGE, storage_usage_ids)


def pages(
    database: Database, *, since: datetime, until: datetime, account_id: str | None = None, page: int = PAGE
) -> Iterator[Sequence[UsageLine]]:
    """All lines from `since` to before `until`: of an account, or of all."""
    for account in _accounts(database, account_id):
        for used in (_OPERATIONS, _STORAGE):
            yield from _in_pages(database, used, account, (since, until), page)


def count(database: Database, *, since: datetime, until: datetime, account_id: str | None = None) -> int:
    """How many lines there are."""
    total = 0
    for used in (_OPERATIONS, _STORAGE):
        query = select(func.count()).select_from(used.table).where(used.at >= since, used.at < until)
        if account_id is not None:
            query = query.where(used.table.c.account_id == account_id)
        with database.read() as tx:
            total += tx.execute(query).scalar_one()
    return total


def _accounts(database: Database, account_id: str | None) -> Sequence[str]:
    if account_id is not None:
        return [account_id]
    with database.read() as tx:
        return tx.execute(select(tables.account.c.id).order_by(tables.account.c.id)).scalars().all()


def _in_pages(
    database: Database, used: _Used, account_id: str, period: tuple[datetime, datetime], page: int
) -> Iterator[Sequence[UsageLine]]:
    number, (after, until) = used.table.c.id, period
    last = -1  # the first number is 1
    while True:
        later = or_(used.at > after, and_(used.at == after, number > last))
        wanted = (used.table.c.account_id == account_id, used.at >= after, used.at < until, later)
        with database.read() as tx:
            rows = tx.execute(used.query().where(*wanted).order_by(used.at, number).limit(page)).all()
            lines = _lines(tx, used, rows)
        if rows:
            yield lines
        if len(rows) < page:
            return
        after, last = rows[-1].at, rows[-1].number


def _of_numbers(tx: Connection, used: _Used, numbers: Collection[int]) -> Sequence[UsageLine]:
    number = used.table.c.id
    return _lines(tx, used, tx.execute(used.query().where(number.in_(numbers)).order_by(number)).all())


def _lines(tx: Connection, used: _Used, rows: Sequence[Row[Any]]) -> Sequence[UsageLine]:
    currency = rate_cards.currency(tx) if rows else ""
    return [used.line(row, currency) for row in rows]


@dataclass(frozen=True)
class _Used:
    """Where one sort of lines is read.

    Attributes:
        at: the column that says when.
        charged: which entry of the ledger is a row's charge.
        others: columns of a line that are not of this table.
        uncharged: the charge where there is no entry.
    """

    prefix: str
    at: ColumnElement[Any]
    table: Table
    charged: ColumnElement[bool]
    others: Mapping[str, ColumnElement[Any]]
    uncharged: int | None

    def query(self) -> Select[Any]:
        """All of them, with their charges."""
        plain = [self.table.c[name] for name in _NAMES if name in self.table.c and name not in self.others]
        others = [column.label(name) for name, column in self.others.items()]
        given = (self.table.c.id.label("number"), self.at.label("at"), _entry.c.amount.label("charge"))
        return select(*given, *plain, *others).select_from(self.table.outerjoin(_entry, self.charged))

    def line(self, row: Row[Any], currency: str) -> UsageLine:
        """A row as a line."""
        values = dict(row._mapping)
        number, charge = values.pop("number"), values.pop("charge")
        charge = self.uncharged if charge is None else charge
        return UsageLine(id=f"{self.prefix}-{number}", charge=charge, currency=currency, **values)


_NAMES = tuple(name for name in UsageLine.__dataclass_fields__ if name not in ("id", "at", "charge", "currency"))
_OPERATIONS = _Used(
    "usage",
    _record.c.finished_at,
    _record,
    _entry.c.operation_id == _record.c.operation_id,
    {"byte_seconds": literal(0)},
    None,
)
_STORAGE = _Used(
    "storage",
    _storage.c.hour,
    _storage,
    _entry.c.storage_usage_id == _storage.c.id,
    {
        "kind": _storage.c.kind + literal("_storage"),
        "device": null(),
        **{name: literal(0) for name in COUNTS},
    },
    0,
)
