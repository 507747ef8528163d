"""Budgets are held against ledger and journal, and what is held for nothing is released."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import structlog
from sqlalchemy import Connection, insert, update

from billing import budget_checks, budgets, dimensions, money, verify
from billing.budget_checks import Misfit
from billing.budgets import Period, Scope
from billing.verify import Wrong
from storage import billing_tables
from storage.database import Database
from storage.journal import Operation
from storage.runs import Run
from tests.contracts.ledger_kit import charge, price_seconds
from tests.factories import NOW, complete, make_operation, make_run, make_session

SECOND = 10**9
_budget = billing_tables.budget


@pytest.fixture
def run(database: Database) -> Run:
    """A run that a budget of every scope covers, charged 3 and with something held."""
    with database.begin() as tx:
        price_seconds(tx)
        session = make_session(tx, project_id="p", api_key_id=7, tags=["batch:b"])
        run = make_run(tx, session=session)
        ids = {Scope.ACCOUNT: run.account_id, Scope.PROJECT: "p", Scope.KEY: "7", Scope.BATCH: "b"}
        ids |= {Scope.SESSION: session.id, Scope.RUN: run.id}
        for scope in Scope:
            budgets.add(tx, run.account_id, scope, ids[scope], cap=10 * money.SCALE, now=NOW, period=Period.MONTH)
        charge(tx, run, 1, 3 * SECOND, at=NOW)
        hold(tx, run, make_operation(tx, run, 2), 4)
        return run


def hold(tx: Connection, run: Run, operation: Operation, units: int) -> None:
    whom = dataclasses.replace(dimensions.of_session(tx, run.session_id), run_id=run.id)
    budgets.hold(tx, budgets.lock(tx, [whom], now=NOW), operation.id, units * money.SCALE)


def misfits(database: Database) -> list[Misfit]:
    with database.read() as tx:
        return list(budget_checks.misfits(tx))


def test_budgets_of_every_scope_are_what_their_entries_and_holds_say(database: Database, run: Run) -> None:
    with database.read() as tx:
        found = budgets.list_budgets(tx, [run.account_id], now=NOW)
    assert {(one.spent, one.held) for one in found} == {(3 * money.SCALE, 4 * money.SCALE)}
    assert misfits(database) == []


@pytest.mark.parametrize("scope", Scope)
@pytest.mark.parametrize("what", ["spent", "held"])
def test_a_budget_that_was_altered_is_found(database: Database, run: Run, scope: Scope, what: str) -> None:
    # Given
    right = (3 if what == "spent" else 4) * money.SCALE
    with database.begin() as tx:
        altered = update(_budget).where(_budget.c.scope == scope).values({what: _budget.c[what] + 1})
        budget_id = tx.execute(altered.returning(_budget.c.id)).scalar_one()
    # When, then
    assert misfits(database) == [Misfit(budget_id, what, right, right + 1)]
    with database.read() as tx:
        (found,) = verify.differences(tx)
    assert (found.wrong, found.source) == (Wrong.BUDGET, f"budget:{budget_id}: {what}")


def test_what_is_held_for_an_operation_that_has_ended_is_found_and_released(database: Database, run: Run) -> None:
    # Given: a hold that nothing has released as its operation ended
    with database.begin() as tx:
        ended = make_operation(tx, run, 3)
        hold(tx, run, ended, 5)
        complete(tx, ended)
    assert {(one.what, one.found) for one in misfits(database)} == {("held for what has ended", 5 * money.SCALE)}
    # When
    with structlog.testing.capture_logs() as logs:
        assert budget_checks.release_leftovers(database, batch=1) == 1
    # Then: what is held for the one that waits stays
    assert [one["event"] for one in logs] == ["holds_left_over"]
    assert misfits(database) == []
    with database.read() as tx:
        assert {one.held for one in budgets.list_budgets(tx, [run.account_id], now=NOW)} == {4 * money.SCALE}
    assert budget_checks.release_leftovers(database) == 0


def test_a_removed_budget_is_not_looked_at(database: Database, run: Run) -> None:
    values: dict[str, Any] = {"account_id": run.account_id, "scope": "account", "scope_id": run.account_id}
    values |= {"period": "none", "cap": 1, "is_hard": True, "thresholds": [], "created_at": NOW, "removed_at": NOW}
    with database.begin() as tx:
        tx.execute(insert(_budget).values(**values, period_start=NOW, spent=77))
    assert misfits(database) == []
