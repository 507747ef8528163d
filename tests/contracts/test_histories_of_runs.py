"""What is asked of runs is answered from their rows, however much there is of others of the account."""

from collections.abc import Callable
from datetime import timedelta

import pytest
from sqlalchemy import Connection

from billing import budgets, cost, ledger, usage_totals
from billing.usage_totals import Scope
from storage.database import Database
from storage.runs import Run
from tests.contracts.ledger_kit import charge, price_seconds
from tests.contracts.query_plans import query_plans
from tests.contracts.storage_kit import meter, set_clock
from tests.factories import NOW, make_account, make_checkpoint, make_run, make_session

HOUR = timedelta(hours=1)
BY_ACCOUNT = (
    "ix_usage_record_account_finished",
    "ix_usage_record_account_kind",
    "ix_usage_record_open_account",
    "uq_usage_rollup_dimensions",
    "sqlite_autoindex_usage_rollup_1",
    "ix_storage_usage_account_hour",
    "ix_ledger_entry_account_created",
)
BY_RUN = ("ix_usage_record_open_run", "ix_usage_rollup_run", "ix_storage_usage_run")
TOTALS: list[Callable[[Connection], object]] = [
    lambda tx: usage_totals.charged(tx, Scope(account_id="a", run_id="r")),
    lambda tx: usage_totals.charged(tx, Scope(account_id="a", run_id="r", since=NOW, until=NOW + 3 * HOUR)),
    lambda tx: cost.of_runs(tx, "a", ["r", "s"]),
    lambda tx: cost.report(tx, Scope(account_id="a", run_id="r")),
]


@pytest.mark.parametrize("ask", TOTALS)
def test_what_runs_cost_is_read_from_their_rows(database: Database, ask: Callable[[Connection], object]) -> None:
    with database.read() as tx:
        as_with_many_rows(tx)
        # When
        with query_plans(tx, "usage_rollup") as plans:
            ask(tx)
    # Then
    (plan,) = plans
    assert not [index for index in BY_ACCOUNT if index in plan]
    assert [index for index in BY_RUN if index not in plan] == []


def test_of_an_hour_that_is_cut_no_more_than_the_hour_is_read(database: Database) -> None:
    with database.read() as tx:
        as_with_many_rows(tx)
        # When
        with query_plans(tx, "usage_record") as plans:
            usage_totals.charged(tx, Scope(account_id="a", run_id="r", since=NOW + HOUR / 4, until=NOW + HOUR / 2))
    # Then
    (plan,) = plans
    any_index = "ix_usage_record_"  # PostgreSQL goes by what it knows of the rows
    assert ("ix_usage_record_account_finished" if database.is_sqlite else any_index) in plan


def test_entries_of_a_run_are_read_in_their_order_without_any_others(database: Database) -> None:
    with database.read() as tx:
        as_with_many_rows(tx)
        # When
        with query_plans(tx, "ledger_entry") as plans:
            ledger.list_entries(tx, "a", run_id="r", limit=3)
    # Then
    (plan,) = plans
    assert "ix_ledger_entry_run_created" in plan
    assert "FOR ORDER BY" not in plan.replace("FOR LAST TERM OF ORDER BY", "")


def test_what_a_run_has_spent_is_read_from_its_entries(database: Database) -> None:
    with database.begin() as tx:
        as_with_many_rows(tx)
        run = make_run(tx)
        # When
        with query_plans(tx, "ledger_entry") as plans:
            budgets.add(tx, run.account_id, budgets.Scope.RUN, run.id, cap=1, now=NOW)
    # Then
    (plan,) = plans
    assert "ix_ledger_entry_run_created" in plan


def test_another_account_sees_nothing_of_a_run(database: Database) -> None:
    # Given a run with charges for an operation and for storage
    now, clock = database.now, set_clock(database)
    with database.begin() as tx:
        price_seconds(tx)
        run = make_run(tx, session=make_session(tx, make_account(tx, "owner")))
        charge(tx, run, 0, 5, at=NOW)
        make_checkpoint(tx, run, now=NOW)
    meter(database, clock, at=NOW + 2 * HOUR)
    database.now = now  # type: ignore[method-assign]  # what `set_clock` has put a stand-in for
    # When, then
    with database.read() as tx:
        for account_id, nums in ((run.account_id, (2, 1, 1)), ("another", (0, 0, 0))):
            assert seen(tx, account_id, run) == nums


def seen(tx: Connection, account_id: str, run: Run) -> tuple[int, int, int]:
    """Rows of its usage, runs that have cost something, and entries."""
    totals = usage_totals.totals(tx, Scope(account_id=account_id, run_id=run.id))
    costs = cost.of_runs(tx, account_id, [run.id])
    entries = ledger.list_entries(tx, account_id, run_id=run.id, limit=9)
    return len(totals), sum(1 for amount in costs.values() if amount), len(entries)


def as_with_many_rows(tx: Connection) -> None:
    """Let PostgreSQL decide as it does where there are many rows."""
    if tx.dialect.name != "sqlite":
        tx.exec_driver_sql("SET LOCAL enable_seqscan = off")
