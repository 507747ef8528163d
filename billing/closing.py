"""Closes periods: what an account's ledger holds open becomes an invoice.

A period takes all open entries that were made before its end, late ones of earlier periods too: what is committed
after its period has been closed falls into the next one. A period is closed once, however often and from wherever it
is asked. One whose total no row could hold is closed in parts, an invoice each.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import structlog
from sqlalchemy import Connection, func, select, update

from billing import invoices, issuing, ledger, money
from billing.invoices import Invoice, InvoiceError, InvoiceKind
from billing.money import AmountError
from storage import billing_tables, tables
from storage.database import Database
from storage.errors import DatabaseUnavailableError
from storage.patience import unhurried

GRACE = timedelta(minutes=5)
"""A month is closed this long after its end: what was under way then is on its invoice, and not on the next one."""

log = structlog.get_logger()
_entry = billing_tables.ledger_entry


def close(tx: Connection, account_id: str, *, end: datetime, now: datetime) -> Invoice | None:
    """Close the account's period that ends at this moment, or the first part of it if a total cannot hold it all.

    Returns:
        The invoice; None if nothing is open, or the period is closed already.

    Raises:
        InvoiceError: the period has not ended.
        AmountError: entries of a single moment are too large for a total.
    """
    if end > now:
        raise InvoiceError(f"a period that ends at {end:%Y-%m-%d %H:%M:%S %Z} has not ended; choose an earlier end")
    invoice_id = issuing.lock(tx) + 1
    before = invoices.newest_period(tx, account_id)
    first = first_open(tx, account_id)
    if first is None or first >= end or (before is not None and before.period_end >= end):
        return None
    end = _fitting_end(tx, account_id, first if before is None else max(first, before.period_end), end)
    open_ = (_entry.c.account_id == account_id, _entry.c.invoice_id.is_(None), _entry.c.created_at < end)
    tx.execute(update(_entry).where(*open_).values(invoice_id=invoice_id))
    start = month_start(first) if before is None else max(before.period_end, month_start(first))
    return issuing.issue(tx, invoice_id, kind=InvoiceKind.INVOICE, account_id=account_id, period=(start, end), now=now)


def close_due(database: Database, *, pass_s: float) -> bool:
    """Close all months that have ended and are not closed yet, each account's in a transaction of its own.

    Args:
        pass_s: nothing more is closed after so many seconds.

    Returns:
        Whether every account was looked at.
    """
    stop_at = time.monotonic() + pass_s
    with database.read() as tx:
        accounts = tx.execute(select(tables.account.c.id).order_by(tables.account.c.id)).scalars().all()
    for account_id in accounts:
        while _close_next(database, account_id):
            if time.monotonic() > stop_at:
                return False
    return True


def due(tx: Connection, account_id: str, *, now: datetime) -> datetime | None:
    """The end of the oldest month of this account that is over and not closed; None if there is none."""
    first, before = first_open(tx, account_id), invoices.newest_period(tx, account_id)
    if first is None:
        return None
    end = month_end(first if before is None else max(first, before.period_end))
    return end if end + GRACE <= now else None


def first_open(tx: Connection, account_id: str) -> datetime | None:
    """When the oldest entry was made that is on no invoice."""
    open_ = select(func.min(_entry.c.created_at, type_=_entry.c.created_at.type))
    found: datetime | None = tx.execute(
        open_.where(_entry.c.account_id == account_id, _entry.c.invoice_id.is_(None))
    ).scalar_one()
    return found


def month_start(at: datetime) -> datetime:
    """The first moment of the month that this moment is in, UTC."""
    at = at.astimezone(UTC)
    return datetime(at.year, at.month, 1, tzinfo=UTC)


def month_end(at: datetime) -> datetime:
    """The first moment of the month after the one that this moment is in, UTC."""
    return month_start(month_start(at) + timedelta(days=31))


def _fitting_end(tx: Connection, account_id: str, first: datetime, end: datetime) -> datetime:
    """The end, or an earlier one after `first` if a total cannot hold all that is open before it."""

    def fits(until: datetime) -> bool:
        open_ = (_entry.c.account_id == account_id, _entry.c.invoice_id.is_(None), _entry.c.created_at < until)
        room: int = money.UNITS_MAX - money.SCALE  # rounding needs some
        return abs(ledger.total_units(tx, *open_)) <= room

    if fits(end):
        return end
    soonest, latest = first + timedelta(microseconds=1), end
    if not fits(soonest):
        return end
    while latest - soonest > timedelta(microseconds=1):
        middle = soonest + (latest - soonest) / 2
        soonest, latest = (middle, latest) if fits(middle) else (soonest, middle)
    return soonest


def _close_next(database: Database, account_id: str) -> bool:
    """Close the account's oldest month that is due; whether another one may be."""
    with database.read() as tx:  # most often there is none, and the number need not be locked
        end = due(tx, account_id, now=database.now(tx))
    if end is None:
        return False
    try:
        with database.begin() as tx, unhurried(tx):
            invoice = close(tx, account_id, end=end, now=database.now(tx))
    except AmountError as error:
        log.error("invoice_too_large", account=account_id, period_end=end.isoformat(), error=str(error))
        return False
    except DatabaseUnavailableError as error:  # the others' may be closed all the same
        log.error("invoice_not_issued", account=account_id, period_end=end.isoformat(), error=str(error))
        return False
    if invoice is not None:
        log.info("invoice_issued", number=invoice.number, account=account_id, period_end=end.isoformat())
    return True
