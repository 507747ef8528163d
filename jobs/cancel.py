"""Cancels a sample that nobody waits for, and releases what caps hold for it."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection

from billing import budgets
from storage import journal


def cancel_sample(tx: Connection, request_id: str, *, account_id: str, now: datetime) -> bool:
    """Cancel a sample that has no outcome; anything else is left as it is.

    Returns:
        Whether it was cancelled by this call.

    Raises:
        RowNotFoundError: the account has no such operation.
    """
    operation = journal.get_operation(tx, request_id, account_id=account_id)
    cancelled = journal.cancel(tx, request_id, account_id=account_id, now=now)
    if cancelled:
        budgets.book(tx, [], now=now, ended={operation.id: operation.account_id})
    return cancelled
