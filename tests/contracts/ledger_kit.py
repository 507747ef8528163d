"""What tests of invoices book: charges of a known amount, and payments."""

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, select

from billing import ledger, rate_cards
from billing.dimensions import Dimensions
from billing.ledger import Entry, EntryKind, NewEntry
from storage import billing_tables
from storage.runs import Run
from tests.factories import NOW, bill, make_operation, make_usage

CARD = '[device_seconds]\n"*" = "1"\n'
HOUR = timedelta(hours=1)


def price_seconds(tx: Connection, *, now: datetime = NOW) -> None:
    """From now on a device-second costs 1, and nothing else costs anything."""
    rate_cards.add(tx, CARD, now=now - timedelta(days=400))


def charge(
    tx: Connection, run: Run, seq: int, nanos: int, *, at: datetime, kind: str = "forward_backward", **used: Any
) -> Entry:
    """An operation that took so many nanoseconds, charged as many 10⁻⁹ of the currency."""
    operation = make_operation(tx, run, seq, kind)
    bill(tx, run, operation, make_usage(device_ns=nanos, **used), now=at)
    return last_entry(tx)


def pay(tx: Connection, account_id: str, source: str, units: int, *, at: datetime) -> Entry:
    """A top-up."""
    ledger.append(tx, [NewEntry(EntryKind.TOP_UP, source, Dimensions(account_id), -units)], now=at)
    return last_entry(tx)


def last_entry(tx: Connection) -> Entry:
    """The newest entry of the ledger."""
    table = billing_tables.ledger_entry
    return ledger.entry_of(tx.execute(select(table).order_by(table.c.id.desc()).limit(1)).one()._mapping)


def entries(tx: Connection, *wanted: Any) -> list[Entry]:
    """Entries of the ledger, oldest first."""
    table = billing_tables.ledger_entry
    return [ledger.entry_of(row._mapping) for row in tx.execute(select(table).where(*wanted).order_by(table.c.id))]
