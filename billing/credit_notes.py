"""Credit notes: invoices of negative total that take back charges of an earlier one, entry by entry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from billing import corrections, invoice_lines, invoices, issuing, ledger, money
from billing.invoices import Invoice, InvoiceError, InvoiceKind
from billing.ledger import Entry, EntryKind, NewEntry


def credit(
    tx: Connection,
    invoice: Invoice,
    *,
    reason: str,
    now: datetime,
    line: int | None = None,
    units: int | None = None,
    reference: str | None = None,
) -> tuple[Invoice, bool]:
    """Take back charges of an invoice: one adjustment for each, on a credit note that is issued at once.

    Args:
        line: only charges of this line of it; else all.
        units: so much, in `money.SCALE`-ths, charge by charge in the order they were made, the last one in part; else
            all that earlier corrections have left.
        reference: the same one again for the same invoice takes back nothing more, and gets the note that there is.

    Returns:
        The note, and whether it is new.

    Raises:
        InvoiceError: it is a credit note itself, the line is of no charge, less is left to be credited, so little is
            credited that the note would be of nothing, or the reference is that of a note that was asked for otherwise.
        RowNotFoundError: it has no such line.
    """
    if invoice.kind != InvoiceKind.INVOICE:
        raise InvoiceError(f"{invoice.number} is a credit note: credit the invoice that it corrects")
    group = None if line is None else _group(tx, invoice, line)
    note_id = issuing.lock(tx) + 1
    asked_for = None if reference is None else json.dumps({"line": line, "reason": reason, "units": units})
    if reference is not None and (made := invoices.find_credit_note(tx, invoice, reference)) is not None:
        if invoices.asked_for(tx, made) != asked_for:
            raise InvoiceError(
                f"reference {reference!r} is that of credit note {made.number}, which was asked for with another line, "
                "amount or reason: choose another one"
            )
        return made, False
    credited = 0
    for page in invoice_lines.entries(tx, invoice.id, group):
        charges = [entry for entry in page if entry.kind == EntryKind.CHARGE]
        taken = _take(corrections.remaining(tx, charges), None if units is None else units - credited)
        adjustments = [_adjustment(entry, taken[entry.id], note_id, reason) for entry in charges if entry.id in taken]
        ledger.append(tx, adjustments, now=now)
        credited += sum(taken.values())
    if credited == 0 or credited != (units or credited):
        there = money.in_coins(money.from_units(credited), invoice.currency)
        where = f"invoice {invoice.number}" if line is None else f"line {line} of invoice {invoice.number}"
        left = (
            f"only {there} of {where} is left to be credited: ask for no more"
            if credited
            else f"nothing of {where} is left to be credited"
        )
        raise InvoiceError(left)
    if money.round_to_cents(credited, invoice.currency) == 0:
        little = f"{money.plain(money.from_units(credited))} {invoice.currency}"
        raise InvoiceError(
            f"{little} rounds to nothing, and a credit note is of whole cents: credit more at once, or correct the "
            "charge with `piecework billing adjust`, which the next invoice adds up exactly"
        )
    note = issuing.issue(
        tx,
        note_id,
        kind=InvoiceKind.CREDIT_NOTE,
        account_id=invoice.account_id,
        period=(invoice.period_start, invoice.period_end),
        now=now,
        corrects=invoice,
        reason=reason,
        reference=reference,
        asked_for=asked_for,
    )
    return note, True


def _group(tx: Connection, invoice: Invoice, number: int) -> Mapping[str, Any]:
    line = invoices.line(tx, invoice, number)
    if line["kind"] != EntryKind.CHARGE:
        raise InvoiceError(f"line {number} of invoice {invoice.number} is no charge; only charges are credited")
    return line


def _take(standing: Mapping[int, int], wanted: int | None) -> Mapping[int, int]:
    """By entry, what is taken back of what it stands at; those with nothing are left out."""
    taken: dict[int, int] = {}
    for entry_id, units in standing.items():
        share = units if wanted is None else min(units, wanted)
        if share > 0:
            taken[entry_id] = share
            wanted = None if wanted is None else wanted - share
    return taken


def _adjustment(entry: Entry, taken: int, note_id: int, reason: str) -> NewEntry:
    source = f"credit_note:{note_id}:{entry.id}"
    return corrections.adjustment_of(entry, -taken, source=source, reason=reason, invoice_id=note_id)
