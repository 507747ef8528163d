"""What a cap has no room for is refused, with all that follows in its run, until there is room again."""

from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Connection, func, select

from billing import budgets, money, rate_cards
from billing.budgets import NOTED_AGAIN_S, REFUSING_S, Budget, Scope, State
from billing.holds import OverBudgetError
from jobs import caps, sweeper
from jobs.backlog import Backlog
from jobs.operations import Failure, Kind, SamplingParams
from jobs.reminders import Reminders
from jobs.settings import JobsSettings
from jobs.submit import Submitter
from storage import journal, tables
from storage.clock import FrozenClock
from storage.database import Database
from storage.journal import Status
from storage.open import Storage
from storage.runs import ASKED_AGAIN_S, Run
from tests.announcements import Announcements
from tests.factories import (
    make_forward_backward,
    make_optim_step,
    make_run,
    make_sample_body,
    make_sampling_session,
)

CARD = 'currency = "USD"\n[million_tokens."*"]\ntrained = "1000000"\nsampled = "1000000"\n'


@pytest.fixture
def submitter(storage: Storage) -> Submitter:
    return Submitter(storage, Announcements(), Backlog.of(storage.database, JobsSettings()))


@pytest.fixture
def run(database: Database, clock: FrozenClock) -> Run:
    """A run of an account that pays one per token."""
    with database.begin() as tx:
        rate_cards.add(tx, CARD, now=clock.now() - timedelta(days=1))
        return make_run(tx, now=clock.now())


def cap(database: Database, run: Run, units: float) -> Budget:
    with database.begin() as tx:
        amount = money.to_units(Decimal(units))
        return budgets.add(tx, run.account_id, Scope.ACCOUNT, run.account_id, cap=amount, now=database.now(tx))


def held(database: Database, run: Run) -> Decimal:
    with database.read() as tx:
        (budget,) = budgets.list_budgets(tx, [run.account_id], now=database.now(tx))
    return money.from_units(budget.held)


BODY = make_forward_backward(num_data=1)


def train(submitter: Submitter, run: Run, seq: int) -> str:
    return submitter.training(run, seq, BODY, kind=Kind.FORWARD_BACKWARD).request_id


def test_what_is_accepted_is_held_once_and_again_gives_the_same_id_over_the_cap(
    submitter: Submitter, database: Database, run: Run
) -> None:
    # Given
    cap(database, run, BODY.num_tokens)
    first = train(submitter, run, 1)
    # When, then
    assert held(database, run) == BODY.num_tokens
    with pytest.raises(OverBudgetError):
        train(submitter, run, 2)
    assert train(submitter, run, 1) == first
    assert held(database, run) == BODY.num_tokens
    with database.read() as tx:
        assert journal.find_operation(tx, f"{run.id}:2") is None


def test_what_follows_a_refused_operation_is_refused_until_that_is_accepted(
    submitter: Submitter, database: Database, run: Run
) -> None:
    # Given
    budget = cap(database, run, 1)
    with pytest.raises(OverBudgetError):
        train(submitter, run, 1)
    # When, then: a step costs nothing here, and must not overtake
    with pytest.raises(OverBudgetError, match="seq_id 1"):
        submitter.training(run, 2, make_optim_step(), kind=Kind.OPTIM_STEP)
    with database.begin() as tx:
        budgets.set_cap(tx, run.account_id, budget.id, money.to_units(Decimal(100)), now=database.now(tx))
    train(submitter, run, 1)
    submitter.training(run, 2, make_optim_step(), kind=Kind.OPTIM_STEP)


def test_the_place_of_a_refused_operation_is_no_gap_while_its_client_asks(
    submitter: Submitter, database: Database, run: Run, clock: FrozenClock
) -> None:
    # Given
    submitter.training(run, 2, make_optim_step(), kind=Kind.OPTIM_STEP)
    train(submitter, run, 0)
    cap(database, run, 1)
    clock.advance(1000)
    with pytest.raises(OverBudgetError):
        train(submitter, run, 1)
    # When, then
    assert sweeper.close_gaps(database, lambda _: None, gap_timeout_s=60) == []
    clock.advance(ASKED_AGAIN_S + 1)
    assert sweeper.close_gaps(database, lambda _: None, gap_timeout_s=60) == [(run.id, 1)]


def test_what_a_client_has_given_up_keeps_nothing_behind_it_waiting(
    submitter: Submitter, database: Database, run: Run, clock: FrozenClock
) -> None:
    # Given: a place that was refused, and room for it
    train(submitter, run, 0)
    budget = cap(database, run, 1)
    with pytest.raises(OverBudgetError):
        train(submitter, run, 1)
    with database.begin() as tx:
        budgets.set_cap(tx, run.account_id, budget.id, money.to_units(Decimal(1000)), now=database.now(tx))
    # When: its client asks for the next one only, every five seconds
    asked = 0
    while asked <= ASKED_AGAIN_S:
        try:
            train(submitter, run, 2)
            break
        except OverBudgetError:
            asked += 1
            clock.advance(5)
    # Then: for as long as the first might have been asked for again
    assert asked == ASKED_AGAIN_S / 5
    clock.advance(61)
    assert sweeper.close_gaps(database, lambda _: None, gap_timeout_s=60) == [(run.id, 1)]


def test_refusals_of_a_large_payload_leave_no_object(submitter: Submitter, storage: Storage, run: Run) -> None:
    # Given
    cap(storage.database, run, 1)
    large = make_forward_backward(num_data=100)
    stored = sorted(found.key for found in storage.objects.list())
    # When
    for _ in range(3):
        with pytest.raises(OverBudgetError):
            submitter.training(run, 1, large, kind=Kind.FORWARD_BACKWARD)
    # Then
    assert sorted(found.key for found in storage.objects.list()) == stored
    with storage.database.read() as tx:
        assert tx.execute(select(func.count()).select_from(tables.stored_object)).scalar_one() == 0
    # and: with room it is stored, and once there it is found again over the cap
    with storage.database.begin() as tx:
        (budget,) = budgets.list_budgets(tx, [run.account_id], now=storage.database.now(tx))
        budgets.set_cap(tx, run.account_id, budget.id, 10**18, now=storage.database.now(tx))
    request_id = submitter.training(run, 1, large, kind=Kind.FORWARD_BACKWARD).request_id
    with storage.database.begin() as tx:
        budgets.set_cap(tx, run.account_id, budget.id, 1, now=storage.database.now(tx))
    assert submitter.training(run, 1, large, kind=Kind.FORWARD_BACKWARD).request_id == request_id
    assert len(list(storage.objects.list())) == len(stored) + 1


def test_nothing_is_held_for_what_follows_in_a_run_that_was_never_made(
    submitter: Submitter, database: Database, run: Run
) -> None:
    # Given
    cap(database, run, 100)
    submitter.training(run, 0, Failure("no such rank"), kind=Kind.CREATE_MODEL)
    # When: it is accepted as failed, so nothing will ever release a hold
    request_id = train(submitter, run, 1)
    # Then
    with database.read() as tx:
        assert journal.get_operation(tx, request_id).status == Status.FAILED
    assert held(database, run) == 0


@pytest.mark.parametrize(("max_tokens", "sampled"), [(None, 3 * 97), (4, 3 * 4), (1000, 3 * 97)])
def test_a_sample_is_held_up_to_its_longest_generation_or_the_context(max_tokens: int | None, sampled: int) -> None:
    body = make_sample_body((1, 2, 3), num_samples=3, params=SamplingParams(max_tokens=max_tokens, seed=1))
    bound = caps.bound_of(body, context_length=100)
    assert (bound.tokens_prefilled, bound.tokens_sampled) == (3, sampled)


def test_a_paused_run_is_not_announced_until_there_is_room(
    submitter: Submitter, database: Database, run: Run, clock: FrozenClock
) -> None:
    # Given: an operation that was accepted before the cap was spent
    train(submitter, run, 0)
    budget = cap(database, run, 0)
    clock.advance(100)

    def announced() -> list[str]:
        told = Announcements()
        reminders = Reminders(first_s=1, longest_s=10)
        sweeper.sweep(database, told, lambda _: None, JobsSettings(), reminders)
        return told.runs

    # When, then
    assert announced() == []
    with database.begin() as tx:
        budgets.set_cap(tx, run.account_id, budget.id, 1, now=database.now(tx))
    assert announced() == [run.id]


def state(database: Database, run: Run) -> str:
    with database.read() as tx:
        (budget,) = budgets.list_budgets(tx, [run.account_id], now=database.now(tx))
    return str(budget.state)


@pytest.mark.parametrize("by_a_sample", [False, True])
def test_a_budget_says_that_it_refuses_while_something_is_asked_for(
    submitter: Submitter, database: Database, clock: FrozenClock, run: Run, *, by_a_sample: bool
) -> None:
    # Given
    with database.begin() as tx:
        sampling = make_sampling_session(tx)
    budget = cap(database, run, 1)

    def ask() -> None:
        body = make_sample_body(num_samples=2)
        with pytest.raises(OverBudgetError):
            submitter.sample(sampling, 1, body, num_samples=2) if by_a_sample else train(submitter, run, 1)

    # When
    ask()
    # Then: as long as a client asks, and a minute longer
    for _ in range(20):
        clock.advance(5)
        ask()
        assert state(database, run) == State.REFUSING
    clock.advance(REFUSING_S - NOTED_AGAIN_S)
    assert state(database, run) == State.REFUSING
    clock.advance(NOTED_AGAIN_S)
    assert state(database, run) == State.OPEN
    # And: not once there is more room
    ask()
    with database.begin() as tx:
        budgets.set_cap(tx, run.account_id, budget.id, money.to_units(Decimal(100)), now=database.now(tx))
    assert state(database, run) == State.OPEN


def test_a_refusal_is_written_down_every_ten_seconds_at_most(
    submitter: Submitter, database: Database, clock: FrozenClock, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given: samples, of which many are asked for at once
    with database.begin() as tx:
        sampling = make_sampling_session(tx)
    cap(database, run, 1)
    begun, noted = clock.now(), []
    note = budgets.note_refused

    def note_and_count(tx: Connection, *arguments: Any, now: datetime) -> None:
        note(tx, *arguments, now=now)
        noted.append((now - begun).total_seconds())

    monkeypatch.setattr(budgets, "note_refused", note_and_count)
    # When
    for _ in range(0, 2 * int(NOTED_AGAIN_S), 2):
        for seq in range(3):
            with pytest.raises(OverBudgetError):
                submitter.sample(sampling, seq, make_sample_body(num_samples=2), num_samples=2)
        clock.advance(2)
    # Then
    assert noted == [0, NOTED_AGAIN_S]


def test_a_refusal_that_two_have_seen_is_written_down_once(database: Database, clock: FrozenClock, run: Run) -> None:
    budget = cap(database, run, 1)
    for seconds in (0, 1):
        with database.begin() as tx:
            budgets.note_refused(tx, budget, 2 * money.SCALE, now=clock.now() + timedelta(seconds=seconds))
    with database.read() as tx:
        (listed,) = budgets.list_budgets(tx, None, now=clock.now() + timedelta(seconds=1))
    assert listed.refused_at == clock.now()


def test_a_sample_over_the_cap_is_refused(submitter: Submitter, database: Database, run: Run) -> None:
    # Given
    with database.begin() as tx:
        sampling = make_sampling_session(tx)
    cap(database, run, 1)
    # When, then
    with pytest.raises(OverBudgetError):
        submitter.sample(sampling, 1, make_sample_body(num_samples=2), num_samples=2)
