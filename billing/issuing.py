"""Writes invoices, one at a time: numbers have no gap, and what is committed meanwhile is left open.

Entries are put on an invoice first (`invoice_id`, which the ledger lets be set once), then added up and the invoice is
written, all in one transaction that holds the row of the newest number.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, insert, select, update

from billing import invoice_document, invoice_lines, invoices, ledger, money, owed, rate_cards
from billing.dimensions import Dimensions
from billing.invoice_document import Head
from billing.invoices import Invoice, InvoiceKind
from billing.ledger import EntryKind, NewEntry
from storage import billing_tables, rows, tables

_table = billing_tables.invoice
_number = billing_tables.invoice_number


def lock(tx: Connection) -> int:
    """The number of the newest invoice, held until the transaction ends: one at a time closes or corrects."""
    rows.insert_if_absent(tx, _number, id=1, last=0)
    return int(tx.execute(select(_number.c.last).where(_number.c.id == 1).with_for_update()).scalar_one())


def issue(
    tx: Connection,
    invoice_id: int,
    *,
    kind: InvoiceKind,
    account_id: str,
    period: tuple[datetime, datetime],
    now: datetime,
    corrects: Invoice | None = None,
    reason: str | None = None,
    reference: str | None = None,
    asked_for: str | None = None,
) -> Invoice:
    """Write the invoice of the entries that have been put on it, with an entry of its own for its rounding.

    Args:
        invoice_id: one more than `lock` has returned; it is the number, too.

    Raises:
        AmountError: the total is too large for a row.
    """
    currency = rate_cards.currency(tx)
    lines = invoice_lines.of_invoice(tx, invoice_id)
    subtotal = sum(line.units for line in lines)
    total = money.to_units(money.from_units(money.round_to_cents(subtotal, currency)))
    name = tx.execute(select(tables.account.c.name).where(tables.account.c.id == account_id)).scalar_one()
    head = Head(
        number=invoice_id,
        kind=kind,
        account_id=account_id,
        account_name=name,
        period_start=period[0],
        period_end=period[1],
        issued_at=now,
        currency=currency,
        corrects=None if corrects is None else corrects.number,
        reason=reason,
        owed_before=owed.invoiced_units(tx, account_id),
    )
    content = invoice_document.write(head, lines, total=total)
    invoice = Invoice(
        id=invoice_id,
        number=invoice_id,
        kind=kind,
        account_id=account_id,
        period_start=period[0],
        period_end=period[1],
        currency=currency,
        units=total,
        corrects_id=None if corrects is None else corrects.id,
        sha256=invoices.digest(content),
        created_at=now,
        reference=reference,
    )
    values = dict(invoice.__dict__)
    tx.execute(insert(_table).values(total=values.pop("units"), document=content, asked_for=asked_for, **values))
    tx.execute(update(_number).where(_number.c.id == 1).values(last=invoice_id))
    if total != subtotal:
        ledger.append(tx, [_rounding(invoice, total - subtotal)], now=now)
    return invoice


def _rounding(invoice: Invoice, units: int) -> NewEntry:
    source = f"rounding:{invoice.number}"
    return NewEntry(EntryKind.ROUNDING, source, Dimensions(invoice.account_id), units, invoice_id=invoice.id)
