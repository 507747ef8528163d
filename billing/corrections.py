"""Corrections: adjustment entries that name the entry that they correct; nothing that was written is changed.

What always holds: the corrections of an entry never outweigh it. A charge of 5 can be corrected down to 0 and up
without bound, but not to less than nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from sqlalchemy import Connection, select

from billing import issuing, ledger, money
from billing.invoices import InvoiceError
from billing.ledger import Entry, EntryKind, NewEntry
from storage import billing_tables
from storage.errors import RowNotFoundError

_entry = billing_tables.ledger_entry
_IDS_PER_QUERY = 500


def adjust(
    tx: Connection, entry_id: int, *, units: int, reason: str, reference: str, now: datetime
) -> tuple[NewEntry, bool]:
    """Correct an entry by an amount, which the account's next invoice will show.

    Args:
        units: what is added, in `money.SCALE`-ths; negative is in favour of the account.
        reference: the same one again for the same entry is booked once.

    Returns:
        The adjustment, and whether it is new.

    Raises:
        RowNotFoundError: there is no such entry.
        InvoiceError: it cannot be corrected, or not by so much.
    """
    issuing.lock(tx)  # one correction at a time, so that together they do not outweigh the entry
    row = tx.execute(select(_entry).where(_entry.c.id == entry_id)).one_or_none()
    if row is None:
        raise RowNotFoundError("ledger entry", entry_id)
    corrected = ledger.entry_of(row._mapping)
    adjustment = adjustment_of(corrected, units, source=f"adjustment:{entry_id}:{reference}", reason=reason)
    booked = ledger.find(tx, adjustment.source)
    if booked is not None:
        if (booked.units, booked.note) != (units, reason):
            raise InvoiceError(f"reference {reference!r} is that of another correction: choose another one")
        return adjustment, False
    left = remaining(tx, [corrected])[entry_id]
    if (left + units) * corrected.units < 0 or (corrected.units == 0 and units < 0):
        raise InvoiceError(
            f"entry {entry_id} stands at {_plain(left)} with its corrections: {_plain(units)} would outweigh it"
        )
    ledger.append(tx, [adjustment], now=now)
    return adjustment, True


def adjustment_of(corrected: Entry, units: int, *, source: str, reason: str, invoice_id: int | None = None) -> NewEntry:
    """An entry that corrects another one, for the same account, project, key, session, batch and run.

    Raises:
        InvoiceError: the other one is itself a correction or a rounding, or the amount is 0.
    """
    if corrected.kind in (EntryKind.ADJUSTMENT, EntryKind.ROUNDING):
        instead = f"; correct entry {corrected.corrects_id} instead" if corrected.corrects_id else ""
        raise InvoiceError(f"entry {corrected.id} is of kind {corrected.kind}, which is not corrected itself{instead}")
    if units == 0:
        raise InvoiceError("a correction of 0 changes nothing: name another amount")
    return NewEntry(
        EntryKind.ADJUSTMENT,
        source,
        corrected.dimensions,
        units,
        corrects_id=corrected.id,
        note=reason,
        invoice_id=invoice_id,
    )


def remaining(tx: Connection, entries: Sequence[Entry]) -> Mapping[int, int]:
    """By the id of each entry, its amount with all corrections, in `money.SCALE`-ths."""
    left = {entry.id: entry.units for entry in entries}
    ids = list(left)
    for begin in range(0, len(ids), _IDS_PER_QUERY):
        page = ids[begin : begin + _IDS_PER_QUERY]
        found = select(_entry.c.corrects_id, _entry.c.amount).where(_entry.c.corrects_id.in_(page))
        for corrects_id, units in tx.execute(found):
            left[corrects_id] += units
    return left


def _plain(units: int) -> str:
    return money.plain(money.from_units(units))
