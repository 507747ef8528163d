"""Budgets tell webhooks of thresholds, pauses and their ends: once each, in the transaction that makes them so."""

import contextlib
import json
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Connection, select

from billing import budgets, ledger, money, rate_cards, webhooks
from billing.budgets import TOLD_AGAIN_S, Budget, Period, Scope, State
from billing.dimensions import Dimensions
from billing.ledger import EntryKind, NewEntry
from storage import billing_tables
from storage.database import Database
from storage.runs import Run
from tests.factories import NOW, bill, make_account, make_operation, make_run, make_usage

DAY = timedelta(days=1)
CARD = 'currency = "USD"\n[million_tokens."*"]\ntrained = "1000000"\n'  # one token costs one


@pytest.fixture
def run(database: Database) -> Run:
    """A run whose tokens cost one each, of an account with a webhook; others have theirs."""
    with database.begin() as tx:
        rate_cards.add(tx, CARD, now=NOW - 2 * DAY)
        run = make_run(tx)
        webhooks.add(tx, run.account_id, "https://ours.test/", ["budget"], now=NOW)
        webhooks.add(tx, run.account_id, "https://usage.test/", ["usage"], now=NOW)
        webhooks.add(tx, make_account(tx, "other").id, "https://theirs.test/", ["budget"], now=NOW)
        return run


def add(tx: Connection, run: Run, cap: int, **more: Any) -> Budget:
    return budgets.add(tx, run.account_id, Scope.RUN, run.id, **{"cap": units(cap), "now": NOW, **more})


def units(amount: int) -> int:
    return money.to_units(Decimal(amount))


def train(tx: Connection, run: Run, seq: int, tokens: int, **more: Any) -> None:
    bill(tx, run, make_operation(tx, run, seq), make_usage(tokens_trained=tokens), **more)


def told(tx: Connection) -> list[tuple[str, int | None]]:
    """What webhooks are told of, oldest first: what, and at which per cent."""
    return [(one["type"].removeprefix("budget."), one["data"].get("threshold_percent")) for one in bodies(tx)]


def bodies(tx: Connection) -> list[dict[str, Any]]:
    delivery, webhook = billing_tables.webhook_delivery.c, billing_tables.webhook.c
    query = select(delivery.body, webhook.url).join(billing_tables.webhook, webhook.id == delivery.webhook_id)
    found = tx.execute(query.order_by(delivery.id)).all()
    assert {row.url for row in found} <= {"https://ours.test/"}
    return [json.loads(row.body) for row in found]


def test_a_threshold_is_told_of_once_with_what_a_receiver_needs(database: Database, run: Run) -> None:
    with database.begin() as tx:
        # Given
        budget = add(tx, run, 10)
        # When
        for seq, tokens in enumerate([4, 1, 1, 3]):
            train(tx, run, seq, tokens)
        # Then
        assert told(tx) == [("threshold_reached", 50), ("threshold_reached", 80)]
        assert bodies(tx)[0] == {
            "type": "budget.threshold_reached",
            "timestamp": NOW.isoformat(),
            "data": {
                "account": run.account_id,
                "budget": budget.id,
                "scope": "run",
                "scope_id": run.id,
                "period": "none",
                "is_hard": True,
                "cap": "10",
                "spent": "5",
                "held": "0",
                "threshold_percent": 50,
                "currency": "USD",
            },
        }


def test_what_is_rolled_back_is_not_told_and_told_when_it_is_done_again(database: Database, run: Run) -> None:
    with database.begin() as tx:
        add(tx, run, 10)
    # When
    with contextlib.suppress(ZeroDivisionError), database.begin() as tx:
        train(tx, run, 0, 6)
        assert told(tx)
        raise ZeroDivisionError
    # Then
    with database.begin() as tx:
        assert told(tx) == []
        train(tx, run, 0, 6)
        assert told(tx) == [("threshold_reached", 50)]


def test_a_pause_and_its_end_by_a_top_up_a_cap_or_a_removal_are_told(database: Database, run: Run) -> None:
    with database.begin() as tx:
        # Given
        budget = add(tx, run, 4, thresholds=[])
        # When
        train(tx, run, 0, 5)
        whom = Dimensions(run.account_id, run_id=run.id)
        ledger.append_once(tx, NewEntry(EntryKind.CREDIT, "credit:1", whom, -units(2)), now=NOW)
        train(tx, run, 1, 2, now=NOW + DAY)
        budgets.set_cap(tx, run.account_id, budget.id, units(6), now=NOW)
        budgets.set_cap(tx, run.account_id, budget.id, units(5), now=NOW)
        budgets.remove(tx, run.account_id, budget.id, now=NOW)
        # Then
        assert told(tx) == [("paused", None), ("resumed", None)] * 3


def test_a_threshold_that_a_lower_cap_reaches_is_told_and_again_once_it_was_not_reached(
    database: Database, run: Run
) -> None:
    with database.begin() as tx:
        # Given: 30 % spent
        budget = add(tx, run, 100, thresholds=[50, 80, 100], is_hard=False)
        train(tx, run, 0, 30)
        # When: the same is 60 %, then 150 %, then 30 % again, and 60 % by spending
        for cap in (50, 20, 100):
            budgets.set_cap(tx, run.account_id, budget.id, units(cap), now=NOW)
        train(tx, run, 1, 30)
        # Then
        assert told(tx) == [("threshold_reached", 50), ("threshold_reached", 100), ("threshold_reached", 50)]


def test_a_pause_that_a_new_period_has_ended_is_told_once_by_whoever_comes_first(database: Database, run: Run) -> None:
    with database.begin() as tx:
        now = database.now(tx)
        tomorrow = now + DAY
        add(tx, run, 4, period=Period.DAY, thresholds=[], now=now - DAY)
        train(tx, run, 0, 5, now=now - DAY)
    # When: a job on a clock
    for _ in range(2):
        budgets.begin_periods(database)
    # Then
    with database.begin() as tx:
        assert told(tx) == [("paused", None), ("resumed", None)]
        # When: work
        train(tx, run, 1, 5, now=now)
        train(tx, run, 2, 1, now=tomorrow)
        # Then
        assert told(tx) == [("paused", None), ("resumed", None)] * 2
    budgets.begin_periods(database)
    with database.read() as tx:
        assert len(told(tx)) == 4


def test_a_budget_that_refuses_is_told_of_once_until_there_is_room_or_nobody_asks(database: Database, run: Run) -> None:
    with database.begin() as tx:
        # Given
        budget = add(tx, run, 4, thresholds=[])
        now = NOW
        # When: asked for again and again
        for _ in range(200):
            now += timedelta(seconds=5)
            budgets.note_refused(tx, budget, units(9), now=now)
        # Then
        assert told(tx) == [("refusing", None)]
        # When: nobody asks for a while
        now += timedelta(seconds=TOLD_AGAIN_S)
        budgets.note_refused(tx, budget, units(9), now=now)
        assert told(tx) == [("refusing", None)] * 2
        # When: another cap, or money
        budgets.set_cap(tx, run.account_id, budget.id, units(5), now=now)
        budgets.note_refused(tx, budget, units(9), now=now)
        assert told(tx) == [("refusing", None)] * 3
        whom = Dimensions(run.account_id, run_id=run.id)
        ledger.append_once(tx, NewEntry(EntryKind.CREDIT, "credit:1", whom, -units(2)), now=now)
        budgets.note_refused(tx, budget, units(9), now=now)
        assert told(tx) == [("refusing", None)] * 4


def test_a_budget_that_is_spent_tells_of_its_pause_alone(database: Database, run: Run) -> None:
    with database.begin() as tx:
        # Given
        budget = add(tx, run, 4, thresholds=[], period=Period.DAY)
        train(tx, run, 0, 5)
        # When: clients ask again and again
        budgets.note_refused(tx, budget, units(9), now=NOW)
        # Then
        assert told(tx) == [("paused", None)]
        (listed,) = budgets.list_budgets(tx, [run.account_id], now=NOW)
        assert listed.state == State.PAUSED
        # And: one that was removed meanwhile tells nothing
        budgets.remove(tx, run.account_id, budget.id, now=NOW)
        budgets.note_refused(tx, budget, units(9), now=NOW + DAY)
        assert told(tx) == [("paused", None), ("resumed", None)]


def test_a_budget_that_refuses_says_so_in_every_period(database: Database, run: Run) -> None:
    with database.begin() as tx:
        # Given
        midnight = (NOW + DAY).replace(hour=0, minute=0, second=0, microsecond=0)
        budget = add(tx, run, 4, thresholds=[], period=Period.DAY)

        def state(now: datetime) -> State:
            (listed,) = budgets.list_budgets(tx, [run.account_id], now=now)
            return listed.state

        # When: a client asks all the while
        for seconds in range(-60, 0, 5):
            budgets.note_refused(tx, budget, units(9), now=midnight + timedelta(seconds=seconds))
        assert state(midnight - timedelta(seconds=1)) == State.REFUSING
        # Then: the new period has refused nothing yet
        assert state(midnight + timedelta(seconds=1)) == State.OPEN
        for seconds in range(2, 60, 5):
            budgets.note_refused(tx, budget, units(9), now=midnight + timedelta(seconds=seconds))
            assert state(midnight + timedelta(seconds=seconds)) == State.REFUSING
        assert told(tx) == [("refusing", None)] * 2


def test_a_refusal_that_comes_after_there_is_room_again_is_not_told(database: Database, run: Run) -> None:
    with database.begin() as tx:
        budget = add(tx, run, 4, thresholds=[])
        budgets.set_cap(tx, run.account_id, budget.id, units(9), now=NOW)
        budgets.note_refused(tx, budget, units(9), now=NOW)
        assert told(tx) == []
        # and: another cap that is no higher changes nothing
        budgets.note_refused(tx, budget, units(10), now=NOW)
        budgets.set_cap(tx, run.account_id, budget.id, units(8), now=NOW)
        (listed,) = budgets.list_budgets(tx, [run.account_id], now=NOW)
        assert (listed.state, told(tx)) == (State.REFUSING, [("refusing", None)])


def test_a_soft_budget_pauses_nothing(database: Database, run: Run) -> None:
    with database.begin() as tx:
        add(tx, run, 4, is_hard=False)
        train(tx, run, 0, 5)
        assert told(tx) == [("threshold_reached", 100)]


def test_a_cap_that_is_spent_as_it_is_added_is_told_of(database: Database, run: Run) -> None:
    with database.begin() as tx:
        # Given
        train(tx, run, 0, 8)
        # When
        budget = add(tx, run, 5)
        add(tx, run, 10)
        # Then
        assert told(tx) == [("threshold_reached", 100), ("paused", None), ("threshold_reached", 80)]
        # and: what is told of is not told again
        budgets.set_cap(tx, run.account_id, budget.id, units(9), now=NOW)
        train(tx, run, 1, 0)
        assert told(tx)[3:] == [("resumed", None)]
