"""Invoices: periods of an account's ledger that are closed. An invoice is written once, with a number without a gap.

What always holds: the sum of an account's ledger entries is that of its invoices' totals, credit notes included, and of
its open entries; the entries of an invoice add up to its total, which is in whole cents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, func, select

from billing import invoice_document, invoice_lines, money
from storage import billing_tables, tables
from storage.errors import RowNotFoundError

_table = billing_tables.invoice
_number = billing_tables.invoice_number
_entry = billing_tables.ledger_entry


class InvoiceKind(StrEnum):
    """What an invoice is."""

    INVOICE = "invoice"
    CREDIT_NOTE = "credit_note"


class InvoiceError(ValueError):
    """An invoice cannot be made as asked; the message says what to change."""


@dataclass(frozen=True)
class Invoice:
    """A row, without its document.

    Attributes:
        number: 1, 2, 3 … over all accounts.
        period_start, period_end: the end is not in it; late entries of earlier periods are.
        units: its total, in `money.SCALE`-ths.
        corrects_id: of a credit note, the invoice that it corrects.
        reference: of a credit note, what it was asked for under, if that was named.
    """

    id: int
    number: int
    kind: str
    account_id: str
    period_start: datetime
    period_end: datetime
    currency: str
    units: int
    corrects_id: int | None
    sha256: str
    created_at: datetime
    reference: str | None = None

    @property
    def total(self) -> Decimal:
        """The total in the currency."""
        return money.from_units(self.units)


def get(tx: Connection, number: int, *, account_id: str | None = None) -> Invoice:
    """The invoice of this number.

    Raises:
        RowNotFoundError: there is none, or it is another account's.
    """
    for invoice in _read(tx, _table.c.number == number, *_of(account_id)):
        return invoice
    raise RowNotFoundError("invoice", number)


def find_credit_note(tx: Connection, invoice: Invoice, reference: str) -> Invoice | None:
    """The credit note of this invoice that was asked for under this reference."""
    return next(_read(tx, _table.c.corrects_id == invoice.id, _table.c.reference == reference), None)


def asked_for(tx: Connection, note: Invoice) -> str | None:
    """What a credit note with a reference was asked for with, as JSON."""
    found: str | None = tx.execute(select(_table.c.asked_for).where(_table.c.id == note.id)).scalar_one()
    return found


def document(tx: Connection, invoice: Invoice) -> dict[str, Any]:
    """What was issued."""
    found: dict[str, Any] = json.loads(text(tx, invoice))
    return found


def text(tx: Connection, invoice: Invoice) -> str:
    """The document's JSON, as it was issued."""
    return str(tx.execute(select(_table.c.document).where(_table.c.id == invoice.id)).scalar_one())


def line(tx: Connection, invoice: Invoice, number: int) -> Mapping[str, Any]:
    """A line of its document; the first one is 1.

    Raises:
        RowNotFoundError: it has no such line.
    """
    for found in document(tx, invoice)["lines"]:
        if found["line"] == number:
            return dict(found)
    raise RowNotFoundError(f"line of invoice {invoice.number} with the number", number)


def list_invoices(
    tx: Connection, *, account_id: str | None = None, limit: int | None = None, offset: int = 0
) -> Sequence[Invoice]:
    """Invoices and credit notes, newest first."""
    return list(_read(tx, *_of(account_id), limit=limit, offset=offset))


def newest_period(tx: Connection, account_id: str) -> Invoice | None:
    """The invoice of the account that closed its newest period."""
    query = _rows().where(_table.c.account_id == account_id, _table.c.kind == InvoiceKind.INVOICE)
    row = tx.execute(query.order_by(_table.c.period_end.desc()).limit(1)).one_or_none()
    return None if row is None else Invoice(**row._mapping)


def digest(content: str) -> str:
    """What the row's `sha256` says of its document."""
    return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class Broken:
    """Something about invoices that does not hold.

    Attributes:
        where: `invoice:NUMBER`, `account:ID` or `invoices`.
    """

    where: str
    what: str
    expected: str
    found: str


def check(tx: Connection) -> Iterator[Broken]:
    """Σ ledger = Σ invoices + open entries, per account; and each invoice is what its entries and its document say."""
    yield from _check_sums(tx)
    yield from _check_numbers(tx)
    owed: dict[str, int] = {}
    for invoice in reversed(list_invoices(tx)):
        for what, expected, found in _check_invoice(tx, invoice, owed.get(invoice.account_id, 0)):
            yield Broken(f"invoice:{invoice.number}", what, str(expected), str(found))
        owed[invoice.account_id] = owed.get(invoice.account_id, 0) + invoice.units


def _check_sums(tx: Connection) -> Iterator[Broken]:
    """By one statement, so that what is committed meanwhile makes no difference."""
    account = tables.account.c.id
    parts = [
        _sums(_entry.c.account_id, _entry.c.amount),
        _sums(_table.c.account_id, _table.c.total),
        _sums(_entry.c.account_id, _entry.c.amount, _entry.c.invoice_id.is_(None)),
    ]
    query: Any = select(account, *(column for part in parts for column in (part.c.high, part.c.low)))
    joined: Any = tables.account
    for part in parts:
        joined = joined.outerjoin(part, part.c.of == account)
    for account_id, *halves in tx.execute(query.select_from(joined)):
        everything, invoiced, open_ = (
            money.sum_of(high or 0, low or 0) for high, low in zip(halves[::2], halves[1::2], strict=True)
        )
        if everything != invoiced + open_:
            yield Broken(
                f"account:{account_id}", "sum of invoices and open", _plain(everything), _plain(invoiced + open_)
            )


def _check_numbers(tx: Connection) -> Iterator[Broken]:
    numbers = select(func.count(_table.c.number), func.max(_table.c.number), select(_number.c.last).scalar_subquery())
    count, highest, last = tx.execute(numbers).one()
    if not (count == (highest or 0) == (last or 0)):
        yield Broken("invoices", "numbers without a gap", f"1 … {last or 0}", f"{count} up to {highest or 0}")


def _check_invoice(tx: Connection, invoice: Invoice, owed: int) -> Iterator[tuple[str, object, object]]:
    content = text(tx, invoice)
    if digest(content) != invoice.sha256:
        yield "document", invoice.sha256, digest(content)
        return
    issued = json.loads(content)
    yield from invoice_document.problems(issued, total=invoice.units)
    lines = invoice_lines.of_invoice(tx, invoice.id)
    high, low = tx.execute(select(*money.sum_columns(_entry.c.amount)).where(_entry.c.invoice_id == invoice.id)).one()
    pairs = (
        ("number", invoice.number, issued["number"]),
        ("account", invoice.account_id, issued["account"]["id"]),
        ("owed before it", _plain(owed), issued["owed_before"]),
        ("sum of its entries", _plain(invoice.units), _plain(money.sum_of(high, low))),
        ("lines", *invoice_document.compared(lines, issued)),
    )
    yield from (pair for pair in pairs if pair[1] != pair[2])


def _sums(of: ColumnElement[Any], units: ColumnElement[int], *wanted: ColumnElement[bool]) -> Any:
    high, low = money.sum_columns(units)
    return select(of.label("of"), high.label("high"), low.label("low")).where(*wanted).group_by(of).subquery()


def _plain(units: int) -> str:
    return money.plain(money.from_units(units))


def _of(account_id: str | None) -> Sequence[Any]:
    return () if account_id is None else (_table.c.account_id == account_id,)


def _read(tx: Connection, *wanted: Any, limit: int | None = None, offset: int = 0) -> Iterator[Invoice]:
    query = _rows().where(*wanted).order_by(_table.c.number.desc()).limit(limit).offset(offset)
    return (Invoice(**row._mapping) for row in tx.execute(query))


def _rows() -> Select[Any]:
    names = [name for name in Invoice.__dataclass_fields__ if name != "units"]
    return select(*(_table.c[name] for name in names), _table.c.total.label("units"))
