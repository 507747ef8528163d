"""What an account owes in all: its invoices' totals, and what is on none yet.

An invoice's total is the sum of its entries, with that of its rounding, and none of them changes any more. So the whole
ledger need not be added up, only what is open: as a rule that of a month.
"""

from __future__ import annotations

from sqlalchemy import Connection, select

from billing import money
from storage import billing_tables

_entry = billing_tables.ledger_entry
_invoice = billing_tables.invoice


def units(tx: Connection, account_id: str) -> int:
    """The sum of all entries of an account, in `money.SCALE`-ths.

    One statement: between two a period could be closed, and what was open would be counted twice.
    """
    open_ = (_entry.c.account_id == account_id, _entry.c.invoice_id.is_(None))
    halves = [select(half).where(*open_).scalar_subquery() for half in money.sum_columns(_entry.c.amount)]
    halves += [
        select(half).where(_invoice.c.account_id == account_id).scalar_subquery()
        for half in money.sum_columns(_invoice.c.total)
    ]
    open_high, open_low, high, low = tx.execute(select(*halves)).one()
    return money.sum_of(open_high, open_low) + money.sum_of(high, low)


def invoiced_units(tx: Connection, account_id: str) -> int:
    """The sum of the totals of an account's invoices and credit notes, in `money.SCALE`-ths."""
    totals = select(*money.sum_columns(_invoice.c.total)).where(_invoice.c.account_id == account_id)
    return money.sum_of(*tx.execute(totals).one())
