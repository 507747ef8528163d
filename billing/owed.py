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
    """The sum of all entries of an account, in `money.SCALE`-ths."""
    open_ = (_entry.c.account_id == account_id, _entry.c.invoice_id.is_(None))
    on_none = tx.execute(select(*money.sum_columns(_entry.c.amount)).where(*open_)).one()
    return invoiced_units(tx, account_id) + money.sum_of(*on_none)


def invoiced_units(tx: Connection, account_id: str) -> int:
    """The sum of the totals of an account's invoices and credit notes, in `money.SCALE`-ths."""
    totals = select(*money.sum_columns(_invoice.c.total)).where(_invoice.c.account_id == account_id)
    return money.sum_of(*tx.execute(totals).one())
