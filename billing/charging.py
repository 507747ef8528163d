"""The bill of one transaction: usage records and their charges, written together with what they are for.

A `Bill` is filled while outcomes are written, and settled once at the end of the same transaction: so a completed
operation has exactly one usage record and one charge, and an operation that failed or was discarded has neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Connection, insert

from billing import dimensions, ledger, money, rate_cards, rating
from billing.budgets import Budget
from billing.dimensions import Dimensions
from billing.ledger import EntryKind, NewEntry
from billing.rate_cards import DatedCard
from billing.usage import Usage, UsageRow
from storage import billing_tables
from storage.journal import Operation

BOOKED_LATE = "booked late"
"""The note of a charge that was made after its operation had ended: its usage record is from before the ledger."""


def operation_source(operation_id: int) -> str:
    """The source of the charge for an operation."""
    return f"operation:{operation_id}"


class Bill:
    """What a transaction charges.

    Args:
        now: the database's time, at which everything on it counts as used and priced.
    """

    def __init__(self, tx: Connection, *, now: datetime) -> None:
        self._tx = tx
        self._now = now
        self._rows: list[UsageRow] = []
        self._ended: dict[int, str] = {}
        self._sessions: dict[str, Dimensions] = {}

    def add(self, usage: Usage, operation: Operation, *, session_id: str, run_id: str | None) -> None:
        """Note what a completed operation has used.

        Args:
            run_id: whose weights it trained or was drawn from, if it is the account's.
        """
        self.end(operation)
        if session_id not in self._sessions:
            self._sessions[session_id] = dimensions.of_session(self._tx, session_id)
        whom = self._sessions[session_id]
        self._rows.append(
            UsageRow(
                usage=usage,
                operation_id=operation.id,
                account_id=operation.account_id,
                project_id=whom.project_id,
                api_key_id=whom.api_key_id,
                session_id=session_id,
                batch=whom.batch,
                run_id=run_id,
                sampling_session_id=operation.sampling_session_id,
                kind=operation.kind,
                base_model=operation.base_model,
                finished_at=self._now,
            )
        )

    def end(self, operation: Operation) -> None:
        """Note that an operation has ended, charged or not: nothing is held for it any more."""
        self._ended[operation.id] = operation.account_id

    def settle(self) -> Sequence[Budget]:
        """Write the usage records and their charges, and release what was held for the operations.

        Returns:
            Those of the budgets which that concerns that pause what they cover once this is committed.
        """
        if self._rows:
            self._tx.execute(insert(billing_tables.usage_record), [row.values() for row in self._rows])
        cards: dict[str, DatedCard] = {}
        for account_id in {row.account_id for row in self._rows}:
            cards[account_id] = rate_cards.in_force(self._tx, account_id, at=self._now)
        entries = [entry_for(row, cards[row.account_id]) for row in self._rows]
        return ledger.append(self._tx, entries, now=self._now, ended=self._ended)


def entry_for(row: UsageRow, dated: DatedCard) -> NewEntry:
    """The charge for a usage record, at the prices of a card."""
    amount = rating.charge(row.usage, row.base_model, dated.card)
    return NewEntry(
        EntryKind.CHARGE,
        operation_source(row.operation_id),
        Dimensions(row.account_id, row.project_id, row.api_key_id, row.session_id, row.batch, row.run_id),
        money.to_units(amount),
        operation_id=row.operation_id,
        rate_card_id=dated.id,
    )
