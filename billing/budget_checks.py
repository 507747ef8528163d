"""Whether budgets stand where ledger and journal say, and the end of holds that nothing has released.

Every way for an operation to end releases its holds in the same transaction, so nothing should ever be found here. But
a hold that was left over would shrink its cap for good: the clock's job ends those, and says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import Connection, Select, String, cast, delete, func, select

from billing import budgets, money
from billing.budgets import Scope
from storage import billing_tables, tables
from storage.database import Database

log = structlog.get_logger()

BATCH = 1_000
_budget = billing_tables.budget
_entry = billing_tables.ledger_entry
_hold = billing_tables.budget_hold
_operation = tables.operation


@dataclass(frozen=True)
class Misfit:
    """A budget that is not what its entries and holds say; amounts are in `money.SCALE`-ths."""

    budget_id: int
    what: str
    expected: int
    found: int


def misfits(tx: Connection) -> Iterator[Misfit]:
    """Live budgets whose `spent` or `held` is another sum, and what is held for operations that have ended."""
    for scope in Scope:
        for row in tx.execute(_standing(scope)):
            spent = budgets.clamped(money.sum_of(row.spent_high, row.spent_low))
            held = budgets.clamped(money.sum_of(row.held_high, row.held_low))
            for what, expected, found in (("spent", spent, row.spent), ("held", held, row.held)):
                if expected != found:
                    yield Misfit(row.id, what, expected, found)
    ended = _left_over(_hold.c.budget_id, func.sum(_hold.c.amount)).group_by(_hold.c.budget_id)
    for budget_id, units in tx.execute(ended.order_by(_hold.c.budget_id)):
        yield Misfit(budget_id, "held for what has ended", 0, int(units))


def release_leftovers(database: Database, *, batch: int = BATCH) -> int:
    """End what is held for operations that have ended; returns for how many something was."""
    num_released = 0
    while True:
        with database.read() as tx:
            found = tx.execute(_left_over(_hold.c.operation_id, _operation.c.account_id).limit(batch))
            ended = {row.operation_id: row.account_id for row in found}
        if not ended:
            return num_released
        with database.begin() as tx:
            budgets.book(tx, [], now=database.now(tx), ended=ended)
            tx.execute(delete(_hold).where(_hold.c.operation_id.in_(ended)))  # of budgets that were removed
        num_released += len(ended)
        log.error("holds_left_over", operations=sorted(ended)[:10], number=len(ended))


def _left_over(*columns: Any) -> Select[Any]:
    return (
        select(*columns)
        .join(_operation, _operation.c.id == _hold.c.operation_id)
        .where(_operation.c.finished_at.is_not(None))
    )


def _standing(scope: Scope) -> Select[Any]:
    """Budgets of a scope beside the sums of their entries and holds, by one statement: work goes on meanwhile."""
    column = _entry.c[budgets.ENTRY_COLUMN[scope]]
    of_scope = (cast(column, String) if scope is Scope.KEY else column) == _budget.c.scope_id  # else with its index
    counted = (_entry.c.account_id == _budget.c.account_id, of_scope, _entry.c.created_at >= _budget.c.period_start)
    spent = [select(half).where(*counted).scalar_subquery() for half in money.sum_columns(_entry.c.amount)]
    held = [
        select(half).where(_hold.c.budget_id == _budget.c.id).scalar_subquery()
        for half in money.sum_columns(_hold.c.amount)
    ]
    names = ("spent_high", "spent_low", "held_high", "held_low")
    sums = [half.label(name) for name, half in zip(names, [*spent, *held], strict=True)]
    columns = (_budget.c.id, _budget.c.spent, _budget.c.held, *sums)
    return select(*columns).where(_budget.c.scope == scope, _budget.c.removed_at.is_(None)).order_by(_budget.c.id)
