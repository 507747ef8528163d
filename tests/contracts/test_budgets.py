"""Budgets count every entry once, hold what is accepted, and begin anew with their period."""

import contextlib
import dataclasses
import random
from datetime import datetime, timedelta
from decimal import Decimal

import pytest
import structlog
from sqlalchemy import Connection, func, select, update

from billing import budgets, dimensions, holds, ledger, money, rate_cards
from billing.budgets import Budget, Period, Scope
from billing.charging import Bill
from billing.dimensions import Dimensions
from billing.holds import OverBudgetError, Wanted
from billing.ledger import EntryKind, NewEntry
from billing.usage import Usage
from storage import billing_tables, tables
from storage.database import Database
from storage.errors import RowNotFoundError
from storage.journal import Operation
from storage.runs import Run
from tests.factories import MODEL, NOW, bill, make_account, make_operation, make_run, make_session, make_usage

DAY = timedelta(days=1)
CARD = 'currency = "USD"\n[million_tokens."*"]\ntrained = "1000000"\n'  # one token costs one


@pytest.fixture
def run(database: Database) -> Run:
    """A run whose tokens cost one each."""
    with database.begin() as tx:
        rate_cards.add(tx, CARD, now=NOW - 2 * DAY)
        session = make_session(tx, project_id="p", api_key_id=7)
        tx.execute(update(tables.session).values(batch="b"))
        return make_run(tx, session=session)


def add(tx: Connection, run: Run, cap: int, scope: Scope = Scope.ACCOUNT, scope_id: str = "", **more: object) -> Budget:
    given = {"cap": money.to_units(Decimal(cap)), "now": NOW, **more}
    return budgets.add(tx, run.account_id, scope, scope_id or run.account_id, **given)  # type: ignore[arg-type]


def standing(tx: Connection, run: Run, at: datetime = NOW) -> list[tuple[Decimal, Decimal]]:
    """(spent, held) of each budget."""
    found = budgets.list_budgets(tx, [run.account_id], now=at)
    return [(money.from_units(one.spent), money.from_units(one.held)) for one in found]


def train(tx: Connection, run: Run, seq: int, tokens: int, at: datetime = NOW) -> Operation:
    operation = make_operation(tx, run, seq)
    bill(tx, run, operation, make_usage(tokens_trained=tokens), now=at)
    return operation


def place(tx: Connection, run: Run, seq: int, tokens: int) -> Operation:
    operation = make_operation(tx, run, seq)
    whom = dataclasses.replace(dimensions.of_session(tx, run.session_id), run_id=run.id)
    bound = make_usage(device_ns=0, tokens_trained=tokens)
    wanted = Wanted(whom, operation.kind, operation.base_model, bound)
    holds.place(tx, budgets.lock(tx, [whom], now=NOW), operation.id, wanted, now=NOW)
    return operation


def top_up(tx: Connection, run: Run, amount: int, at: datetime = NOW) -> None:
    whom = Dimensions(run.account_id)
    ledger.append_once(tx, NewEntry(EntryKind.TOP_UP, f"topup:{at}", whom, -money.to_units(Decimal(amount))), now=at)


def test_what_a_scope_spends_counts_on_its_budgets_and_on_no_others(database: Database, run: Run) -> None:
    with database.begin() as tx:
        # Given
        mine = [(Scope.ACCOUNT, run.account_id), (Scope.PROJECT, "p"), (Scope.KEY, "7"), (Scope.BATCH, "b")]
        mine += [(Scope.SESSION, run.session_id), (Scope.RUN, run.id)]
        others = [(Scope.PROJECT, "q"), (Scope.KEY, "8"), (Scope.BATCH, "c"), (Scope.RUN, f"{run.id}0")]
        for scope, scope_id in mine + others:
            add(tx, run, 100, scope, scope_id)
        second = make_run(tx, session=make_session(tx, account_id=run.account_id))
        add(tx, run, 100, Scope.RUN, second.id)
        # When: both are charged by one transaction
        written = Bill(tx, now=NOW)
        for each, tokens in ((run, 5), (second, 3)):
            used = make_usage(tokens_trained=tokens)
            written.add(used, make_operation(tx, each, 1), session_id=each.session_id, run_id=each.id)
        written.settle()
        # Then
        spent = [8, *[5] * (len(mine) - 1), *[0] * len(others), 3]
        assert standing(tx, run) == [(Decimal(each), 0) for each in spent]


def test_a_budget_that_is_added_late_counts_what_was_spent_before(database: Database, run: Run) -> None:
    with database.begin() as tx:
        train(tx, run, 1, 5, at=NOW - DAY)
        train(tx, run, 2, 3)
        # When
        add(tx, run, 100)
        add(tx, run, 100, period=Period.DAY)
        add(tx, run, 100, Scope.KEY, "7")
        # Then
        assert standing(tx, run) == [(8, 0), (3, 0), (8, 0)]


def test_a_period_begins_anew_by_itself(database: Database, run: Run) -> None:
    with database.begin() as tx:
        add(tx, run, 4, period=Period.DAY)
        train(tx, run, 1, 5)
        assert budgets.exhausted_caps(tx, now=NOW + DAY / 2)
        # Then
        assert not budgets.exhausted_caps(tx, now=NOW + DAY)
        assert standing(tx, run, at=NOW + DAY) == [(0, 0)]
        # When
        train(tx, run, 2, 1, at=NOW + DAY)
        # Then
        assert standing(tx, run, at=NOW + DAY) == [(1, 0)]


def test_a_charge_of_the_period_before_that_comes_late_does_not_count(database: Database, run: Run) -> None:
    with database.begin() as tx:
        add(tx, run, 4, period=Period.MONTH)
        train(tx, run, 1, 1, at=NOW + 40 * DAY)
        # When
        train(tx, run, 2, 2, at=NOW)
        # Then
        assert standing(tx, run, at=NOW + 40 * DAY) == [(1, 0)]


def test_holds_are_placed_until_a_cap_has_no_room_and_released_when_the_operation_ends(
    database: Database, run: Run
) -> None:
    with database.begin() as tx:
        add(tx, run, 10)
        first, second = place(tx, run, 1, 4), place(tx, run, 2, 6)
        assert standing(tx, run) == [(0, 10)]
        # When
        with pytest.raises(OverBudgetError, match="no room"), tx.begin_nested():
            place(tx, run, 3, 1)
        bill(tx, run, first, make_usage(tokens_trained=4))
        failed = Bill(tx, now=NOW)
        failed.end(second)
        failed.settle()
        # Then
        assert standing(tx, run) == [(4, 0)]
        assert tx.execute(select(func.count()).select_from(billing_tables.budget_hold)).scalar_one() == 0
        place(tx, run, 4, 6)


def test_once_a_cap_is_spent_not_even_what_costs_nothing_is_accepted(database: Database, run: Run) -> None:
    with database.begin() as tx:
        add(tx, run, 5)
        train(tx, run, 1, 5)
        # When, then
        with pytest.raises(OverBudgetError, match="no room"):
            place(tx, run, 2, 0)


def test_a_soft_budget_refuses_nothing(database: Database, run: Run) -> None:
    with database.begin() as tx:
        add(tx, run, 1, is_hard=False)
        # When
        place(tx, run, 1, 5)
        train(tx, run, 2, 5)
        # Then
        assert standing(tx, run) == [(5, 5)]
        assert not budgets.exhausted_caps(tx, now=NOW)


def test_a_top_up_a_raised_cap_or_its_removal_end_a_pause(database: Database, run: Run) -> None:
    with database.begin() as tx:
        budget = add(tx, run, 4)
        train(tx, run, 1, 5)
        assert budgets.exhausted_caps(tx, now=NOW)
        # When, then
        top_up(tx, run, 2)
        assert standing(tx, run) == [(3, 0)]
        assert not budgets.exhausted_caps(tx, now=NOW)
        train(tx, run, 2, 5)
        assert budgets.exhausted_caps(tx, now=NOW)
        budgets.set_cap(tx, run.account_id, budget.id, money.to_units(Decimal(9)), now=NOW)
        assert not budgets.exhausted_caps(tx, now=NOW)
        train(tx, run, 3, 5)
        budgets.remove(tx, run.account_id, budget.id, now=NOW)
        assert not budgets.exhausted_caps(tx, now=NOW)
        assert standing(tx, run) == []


def test_another_accounts_budget_is_not_there(database: Database, run: Run) -> None:
    with database.begin() as tx:
        budget = add(tx, run, 4)
        other = make_account(tx, "other")
        # When, then
        with pytest.raises(RowNotFoundError):
            budgets.set_cap(tx, other.id, budget.id, 5, now=NOW)
        with pytest.raises(RowNotFoundError):
            budgets.remove(tx, other.id, budget.id, now=NOW)


def test_device_time_is_estimated_from_the_last_operations(database: Database, run: Run) -> None:
    with database.begin() as tx:
        # Given
        rate_cards.add(tx, 'currency = "USD"\n[device_seconds]\ncpu = "1"\n', now=NOW)
        card = rate_cards.in_force(tx, run.account_id, at=NOW + DAY).card
        most = {"kind": "forward_backward", "base_model": MODEL}
        ten = make_usage(device_ns=0, tokens_trained=10)
        assert holds.most_units(tx, run.account_id, ten, card, **most) == 0
        # When
        operation = make_operation(tx, run, 1)
        bill(tx, run, operation, make_usage(device_ns=10**9, tokens_trained=2))
        # Then
        assert money.from_units(holds.most_units(tx, run.account_id, ten, card, **most)) == Decimal(5)
        # When: many of another kind come after it
        for seq in range(2, holds.LOOKED_AT + 3):
            bill(tx, run, make_operation(tx, run, seq, "sample"), make_usage(tokens_sampled=1))
        # Then
        assert money.from_units(holds.most_units(tx, run.account_id, ten, card, **most)) == Decimal(5)


def test_each_threshold_is_told_of_once_in_a_period(database: Database, run: Run) -> None:
    with structlog.testing.capture_logs() as logs, database.begin() as tx:
        # Given
        add(tx, run, 10, is_hard=False, period=Period.DAY)
        # When
        for seq, tokens in enumerate([4, 1, 1, 3, 1]):
            train(tx, run, seq, tokens)
        train(tx, run, 5, 6, at=NOW + DAY)
    # Then
    assert [one["percent"] for one in logs if one["event"] == "budget_threshold_reached"] == [50, 80, 100, 50]


def test_a_threshold_is_not_logged_where_what_reached_it_is_rolled_back(database: Database, run: Run) -> None:
    # Given
    with database.begin() as tx:
        add(tx, run, 10)
    # When
    with structlog.testing.capture_logs() as logs:
        with contextlib.suppress(ZeroDivisionError), database.begin() as tx:
            train(tx, run, 1, 10)
            raise ZeroDivisionError
        # Then
        assert logs == []
        with database.begin() as tx:
            train(tx, run, 1, 10)
    assert [one["event"] for one in logs] == ["budget_threshold_reached", "budget_paused"]


def test_of_all_budgets_only_those_that_are_concerned_are_read(database: Database, run: Run) -> None:
    with database.begin() as tx:
        # given budgets that cover a run, some of others of the account, one that holds for it, and another account's
        whom = dataclasses.replace(dimensions.of_session(tx, run.session_id), run_id=run.id)
        names = {Scope.ACCOUNT: "", Scope.PROJECT: "p", Scope.KEY: "7", Scope.SESSION: run.session_id, Scope.BATCH: "b"}
        covering = [add(tx, run, 9, scope, name).id for scope, name in {**names, Scope.RUN: run.id}.items()]
        others = [add(tx, run, 9, scope, "x" if scope != Scope.KEY else "8") for scope in Scope if scope != "account"]
        operation = make_operation(tx, run, 1)
        budgets.hold(tx, others[:1], operation.id, 5)
        foreign = make_account(tx, "bob").id
        budgets.add(tx, foreign, Scope.BATCH, "b", cap=9, now=NOW)
        # when
        charged = budgets.lock(tx, [whom], now=NOW)
        ended = budgets.lock(tx, [], now=NOW, ended={operation.id: run.account_id})
        both = budgets.lock(tx, [whom], now=NOW, ended={operation.id: run.account_id})
        # then
        assert [one.id for one in charged] == covering == [one.id for one in budgets.list_covering(tx, whom, now=NOW)]
        assert [one.id for one in ended] == [others[0].id]
        assert [one.id for one in both] == [*covering, others[0].id]
        assert all(one.covers(whom) for one in charged)


@pytest.mark.parametrize("seed", range(5))
def test_priced_by_tokens_nothing_is_spent_beyond_a_cap(database: Database, run: Run, seed: int) -> None:
    chance = random.Random(seed)
    prices = '[million_tokens."*"]\ntrained = "1000000"\nprefilled = "300000"\ncached = "400000"\nsampled = "700000"\n'
    with database.begin() as tx:
        # Given
        rate_cards.add(tx, prices, now=NOW, account_id=run.account_id)
        later = NOW + DAY
        cap = chance.randint(50, 200)
        add(tx, run, cap, now=later)
        whom = dataclasses.replace(dimensions.of_session(tx, run.session_id), run_id=run.id)
        placed: list[tuple[Operation, Usage]] = []
        refused = 0
        # When: operations are accepted as long as there is room, and end in any order, using what they may at most
        for seq in range(60):
            most = {name: chance.randint(0, 9) for name in ("tokens_trained", "tokens_prefilled", "tokens_sampled")}
            operation, bound = make_operation(tx, run, seq), make_usage(device_ns=0, **most)
            wanted = Wanted(whom, operation.kind, operation.base_model, bound)
            try:
                locked = budgets.lock(tx, [whom], now=later)
                holds.place(tx, locked, operation.id, wanted, now=later)
                placed.append((operation, bound))
            except OverBudgetError:
                refused += 1
            while placed and chance.random() < 0.4:
                operation, bound = placed.pop(chance.randrange(len(placed)))
                cached = chance.randint(0, bound.tokens_prefilled)
                used = dataclasses.replace(
                    bound, tokens_prefilled=bound.tokens_prefilled - cached, tokens_cached=cached
                )
                bill(tx, run, operation, used, now=later)
            # Then
            ((spent, held),) = standing(tx, run, at=later)
            assert spent + held <= cap
        assert refused


def test_priced_by_device_time_a_cap_is_overshot_by_what_is_in_flight(database: Database, run: Run) -> None:
    with database.begin() as tx:
        # Given: nothing to estimate from, so all that is asked for is accepted until something is charged
        rate_cards.add(tx, '[device_seconds]\n"*" = "1"\n', now=NOW, account_id=run.account_id)
        later = NOW + DAY
        add(tx, run, 5, now=later)
        whom = dataclasses.replace(dimensions.of_session(tx, run.session_id), run_id=run.id)

        def accept(seq: int) -> Operation:
            operation = make_operation(tx, run, seq)
            bound = make_usage(device_ns=0, tokens_sampled=3 * 100)  # three samples of the longest generation
            wanted = Wanted(whom, operation.kind, operation.base_model, bound)
            holds.place(tx, budgets.lock(tx, [whom], now=later), operation.id, wanted, now=later)
            return operation

        in_flight = [accept(1), accept(2)]
        # When: each takes all that it may
        for operation in in_flight:
            bill(tx, run, operation, make_usage(device_ns=4 * 10**9, tokens_sampled=300), now=later)
        # Then: the cap is overshot by them, and by nothing that comes after them
        assert standing(tx, run, at=later) == [(8, 0)]
        with pytest.raises(OverBudgetError), tx.begin_nested():
            accept(3)
        # and: what is known by now is held
        budgets.set_cap(tx, run.account_id, 1, money.to_units(Decimal(13)), now=later)
        accept(4)
        assert standing(tx, run, at=later) == [(8, 4)]
        with pytest.raises(OverBudgetError):
            accept(5)
