"""What a cap has no room for is refused, with all that follows in its run, until there is room again."""

from datetime import timedelta
from decimal import Decimal

import pytest

from billing import budgets, money, rate_cards
from billing.budgets import Budget, Scope
from billing.holds import OverBudgetError
from jobs import caps, sweeper
from jobs.backlog import Backlog
from jobs.operations import Failure, Kind
from jobs.reminders import Reminders
from jobs.settings import JobsSettings
from jobs.submit import Submitter
from storage import journal
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


def test_a_sample_without_max_tokens_is_held_up_to_the_context(database: Database, run: Run) -> None:
    body = make_sample_body(num_samples=3)
    assert body.params.max_tokens is None or body.params.max_tokens
    longest = 100 - len(body.prompt)
    expected = 3 * min(longest, body.params.max_tokens or longest)
    assert caps.bound_of(body, context_length=100).tokens_sampled == expected


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


def test_a_sample_over_the_cap_is_refused(submitter: Submitter, database: Database, run: Run) -> None:
    # Given
    with database.begin() as tx:
        sampling = make_sampling_session(tx)
    cap(database, run, 1)
    # When, then
    with pytest.raises(OverBudgetError):
        submitter.sample(sampling, 1, make_sample_body(num_samples=2), num_samples=2)
