"""Months are closed when they are over, in order, however late and however often somebody looks."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import event

from billing import closing, invoices, ledger, money
from billing.dimensions import Dimensions
from billing.invoices import Invoice
from billing.ledger import EntryKind, NewEntry
from storage import billing_tables
from storage.clock import FrozenClock
from storage.database import Database
from storage.errors import DatabaseUnavailableError
from tests.contracts.ledger_kit import charge, pay, price_seconds
from tests.contracts.test_database import at_once
from tests.factories import NOW, make_account, make_run

FEBRUARY, MARCH, APRIL = (datetime(2026, month, 1, tzinfo=UTC) for month in (2, 3, 4))
DAY = timedelta(days=1)


@pytest.mark.parametrize(
    ("at", "start", "end"),
    [
        (NOW, NOW, FEBRUARY),
        (FEBRUARY - timedelta(microseconds=1), NOW, FEBRUARY),
        (datetime(2024, 2, 29, tzinfo=UTC), datetime(2024, 2, 1, tzinfo=UTC), datetime(2024, 3, 1, tzinfo=UTC)),
        (datetime(2025, 12, 31, 23, tzinfo=UTC), datetime(2025, 12, 1, tzinfo=UTC), NOW),
    ],
)
def test_a_month_begins_and_ends_on_the_first(at: datetime, start: datetime, end: datetime) -> None:
    assert (closing.month_start(at), closing.month_end(at)) == (start, end)


def test_a_month_is_due_a_moment_after_its_end(database: Database) -> None:
    with database.begin() as tx:
        account = make_account(tx)
        assert closing.due(tx, account.id, now=APRIL) is None
        pay(tx, account.id, "topup:1", 1, at=NOW + DAY)
        # Then
        assert closing.due(tx, account.id, now=FEBRUARY) is None
        assert closing.due(tx, account.id, now=FEBRUARY + closing.GRACE) == FEBRUARY
        assert closing.due(tx, account.id, now=APRIL) == FEBRUARY


def test_all_months_that_are_over_are_closed_in_order_and_once(database: Database) -> None:
    # Given: entries in January and March, none in February, of two accounts
    with database.begin() as tx:
        price_seconds(tx)
        runs = [make_run(tx, make_account(tx, name)) for name in ("a", "b")]
        for run in runs:
            charge(tx, run, 0, 10**9, at=NOW)
            charge(tx, run, 1, 2 * 10**9, at=MARCH + DAY)
    if isinstance(database.clock, FrozenClock):
        database.clock.advance((APRIL + DAY - database.clock.now()).total_seconds())
    # When: several schedulers fire, several times
    at_once(lambda _: [closing.close_due(database, pass_s=60) for _ in range(2)])
    # Then
    with database.read() as tx:
        for run in runs:
            issued = invoices.list_invoices(tx, account_id=run.account_id)
            periods = [(each.period_start, each.period_end, each.total) for each in reversed(issued)]
            assert periods == [(NOW, FEBRUARY, Decimal(1)), (MARCH, APRIL, Decimal(2))]
        assert sorted(each.number for each in invoices.list_invoices(tx)) == [1, 2, 3, 4]
        assert list(invoices.check(tx)) == []


def test_a_pass_ends_in_time_and_the_next_one_goes_on(database: Database) -> None:
    # Given
    with database.begin() as tx:
        for number in range(3):
            pay(tx, make_account(tx, f"account {number}").id, f"topup:{number}", 1, at=NOW)
    if isinstance(database.clock, FrozenClock):
        database.clock.advance((MARCH - database.clock.now()).total_seconds())
    # When
    done = [closing.close_due(database, pass_s=0) for _ in range(4)]
    # Then
    assert done == [False, False, False, True]
    with database.read() as tx:
        assert len(invoices.list_invoices(tx)) == 3


def test_a_total_that_is_too_large_keeps_no_other_account_waiting(database: Database) -> None:
    # Given: one account has paid more at a moment than a row can hold
    with database.begin() as tx:
        large, other = make_account(tx, "large"), make_account(tx, "other")
        for number in range(2):
            pay(tx, large.id, f"topup:{number}", money.UNITS_MAX, at=NOW)
        pay(tx, other.id, "topup:other", money.SCALE, at=NOW)
    if isinstance(database.clock, FrozenClock):
        database.clock.advance((MARCH - database.clock.now()).total_seconds())
    # When
    assert closing.close_due(database, pass_s=60)
    # Then
    with database.read() as tx:
        assert [each.account_id for each in invoices.list_invoices(tx)] == [other.id]
        assert list(invoices.check(tx)) == []


def test_a_month_that_the_database_cannot_close_keeps_no_other_account_waiting(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given: two accounts, and a database that fails in the middle of closing either
    with database.begin() as tx:
        accounts = [make_account(tx, name).id for name in ("one", "two")]
        for account_id in accounts:
            pay(tx, account_id, f"topup:{account_id}", money.SCALE, at=NOW)
    if isinstance(database.clock, FrozenClock):
        database.clock.advance((MARCH - database.clock.now()).total_seconds())
    issue = closing.issuing.issue
    failing = set(accounts)

    def fail(*args: Any, account_id: str, **more: Any) -> Invoice:
        if account_id in failing:
            raise DatabaseUnavailableError("sqlite:///there", "it has not answered")
        return issue(*args, account_id=account_id, **more)

    monkeypatch.setattr(closing.issuing, "issue", fail)
    for left in (accounts[:1], []):
        failing.intersection_update(left)
        # When
        assert closing.close_due(database, pass_s=60)
        # Then: what could be closed is, and numbers have no gap
        with database.read() as tx:
            issued = invoices.list_invoices(tx)
        assert {each.account_id for each in issued} == set(accounts) - set(left)
        assert sorted(each.number for each in issued) == list(range(1, len(issued) + 1))


def test_a_balance_that_is_read_while_a_period_is_closed_counts_nothing_twice(database: Database) -> None:
    # Given
    with database.begin() as tx:
        account = make_account(tx)
        pay(tx, account.id, "topup:1", 3 * money.SCALE, at=NOW)

    def close(*_: Any) -> None:
        with database.begin() as other:
            closing.close(other, account.id, end=NOW + DAY, now=NOW + 2 * DAY)

    # When: it is closed after the first statement of whoever adds up
    with database.read() as tx:
        event.listen(tx, "after_cursor_execute", close, once=True)
        balance = ledger.balance(tx, account.id)
    # Then
    assert balance == 3
    with database.read() as tx:
        assert len(invoices.list_invoices(tx)) == 1
        assert ledger.balance(tx, account.id) == 3


def test_a_month_whose_total_no_row_holds_is_closed_in_parts(database: Database) -> None:
    # Given: charges of 8 million each, and a payment between them that makes room for a fourth
    large = 8 * 10**6 * money.SCALE
    with database.begin() as tx:
        price_seconds(tx)
        run = make_run(tx)
        whom = Dimensions(run.account_id)
        for day, units in enumerate([large, large, -large, large, large, 10**9]):
            source = f"correction:{day}"
            ledger.append(tx, [NewEntry(EntryKind.CREDIT, source, whom, units)], now=NOW + timedelta(days=day))
    if isinstance(database.clock, FrozenClock):
        database.clock.advance((FEBRUARY + timedelta(hours=1) - database.clock.now()).total_seconds())
    # When
    assert closing.close_due(database, pass_s=60)
    # Then: whole entries, in order, and one period follows the other
    with database.read() as tx:
        found = [each for each in reversed(invoices.list_invoices(tx)) if each.period_end <= FEBRUARY]
        assert [each.total for each in found] == [8 * 10**6, 8 * 10**6, 8 * 10**6]
        ends = [each.period_end for each in found]
        assert [each.period_start for each in found] == [NOW, *ends[:-1]]
        assert ends[-1] == FEBRUARY
        assert sum(each.units for each in found) == 3 * large
        assert ledger.total_units(tx, billing_tables.ledger_entry.c.invoice_id.is_(None)) == 0
        assert list(invoices.check(tx)) == []
