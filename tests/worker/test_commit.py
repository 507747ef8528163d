"""One transaction per batch, each run by itself; billed once, whatever the database answered."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from datetime import timedelta

import pytest
from sqlalchemy import Connection, func, select

from billing import budgets, usage_totals
from billing.budgets import Scope
from jobs import operations
from jobs.operations import Failure, OptimStepOutcome, Outcome, SampleOutcome, Saved
from storage import billing_tables, checkpoints, claims, journal, leases, retry, runs, uploads
from storage.clock import FrozenClock
from storage.errors import DatabaseUnavailableError, LeaseLostError, ObjectStoreUnavailableError
from storage.journal import Status
from storage.leases import Lease
from storage.open import Storage
from storage.runs import Run, SamplingSession
from tests.contracts.ledger_kit import price_seconds
from tests.factories import (
    make_account,
    make_checkpoint,
    make_operation,
    make_run,
    make_sample,
    make_sampling_session,
    make_usage,
)
from tests.worker.stand_ins import make_meter
from worker.commit import Committer, Done, RunCommit, SampleCommit

OUTCOME = OptimStepOutcome({"grad_norm": 1.5})


@pytest.fixture
def published() -> list[str]:
    return []


@pytest.fixture
def committer(storage: Storage, published: list[str]) -> Committer:
    return Committer(storage, make_meter(), worker_id="w", publish=published.extend)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying again does not wait."""
    monkeypatch.setattr(retry, "RETRY_FIRST_S", 0.0)


def _held_run(tx: Connection, clock: FrozenClock, account: str = "acme") -> tuple[Run, Lease]:
    run = make_run(tx, make_account(tx, account))
    expires_at = clock.now() + timedelta(seconds=10)
    return run, leases.acquire(tx, run.id, worker_id="w", now=clock.now(), expires_at=expires_at)


def _done(
    tx: Connection, run: Run, seq: int = 0, outcome: Outcome = OUTCOME, kind: str = "optim_step", **changes: object
) -> Done:
    operation = make_operation(tx, run, seq, kind)
    values: dict[str, object] = {"usage": None if isinstance(outcome, Failure) else make_usage(), **changes}
    return Done(operation, outcome, **values)  # type: ignore[arg-type]


def _num_usage_records(storage: Storage) -> int:
    with storage.database.read() as tx:
        return int(tx.execute(select(func.count()).select_from(billing_tables.usage_record)).scalar_one())


def _read(storage: Storage, request_id: str) -> journal.Operation:
    with storage.database.read() as tx:
        return journal.get_operation(tx, request_id)


def _state_seq(storage: Storage, run: Run) -> int:
    with storage.database.read() as tx:
        return runs.get_run(tx, run.id).state_seq


class AnswersLost:
    """A database whose first commits take effect, or not, without telling."""

    def __init__(self, storage: Storage, outcomes: Sequence[str]) -> None:
        self._database = storage.database
        self._outcomes = list(outcomes)
        self.clock = storage.database.clock

    @contextlib.contextmanager
    def begin(self) -> Iterator[Connection]:
        """As the real one, but `after` raises after the commit and `before` instead of it."""
        outcome = self._outcomes.pop(0) if self._outcomes else "told"
        with self._database.begin() as tx:
            yield tx
            if outcome == "before":
                raise DatabaseUnavailableError("the database", "connection lost before the commit")
        if outcome == "after":
            raise DatabaseUnavailableError("the database", "connection lost after the commit")

    def __getattr__(self, name: str) -> object:
        return getattr(self._database, name)


# ------------------------------------------------------------------------------------------------------------ training


def test_a_turn_commits_outcomes_state_and_usage_together(
    storage: Storage, committer: Committer, clock: FrozenClock, published: list[str]
) -> None:
    # Given
    with storage.database.begin() as tx:
        run, lease = _held_run(tx, clock)
        done = [_done(tx, run, seq) for seq in range(2)]
    # When
    lost = committer.commit_runs([RunCommit(run, lease, done)])
    # Then
    assert lost == set()
    assert _state_seq(storage, run) == 1
    for one in done:
        operation = _read(storage, one.operation.request_id)
        assert operation.status == Status.COMPLETED
        assert operations.decode(storage.payloads.get(operation.outcome)) == OUTCOME
    assert published == [f"{run.id}:0", f"{run.id}:1"]
    with storage.database.read() as tx:
        (total,) = usage_totals.totals(tx)
    assert (total.operations, total.device_ns, total.run_id) == (2, 2_000, run.id)


@pytest.mark.parametrize("outcomes", [(), ("before",), ("after",)])
def test_a_commit_tells_which_caps_of_its_accounts_are_spent(
    storage: Storage, clock: FrozenClock, outcomes: Sequence[str]
) -> None:
    # Given
    with storage.database.begin() as tx:
        price_seconds(tx, now=clock.now())
        run, lease = _held_run(tx, clock)
        other = make_run(tx, make_account(tx, "other"))
        spent = budgets.add(tx, run.account_id, Scope.RUN, run.id, cap=1, now=clock.now())
        budgets.add(tx, run.account_id, Scope.ACCOUNT, run.account_id, cap=10**12, now=clock.now())
        budgets.add(tx, other.account_id, Scope.ACCOUNT, other.account_id, cap=0, now=clock.now())
        commits = [RunCommit(run, lease, [_done(tx, run)])]
    lossy = dataclasses.replace(storage, database=AnswersLost(storage, outcomes))  # type: ignore[arg-type]  # a stand-in
    committer = Committer(lossy, make_meter(), worker_id="w", publish=lambda _: None)
    told: list[int] = []
    committer.on_spent = lambda spent: told.extend(budget.id for budget in spent)
    # When
    committer.commit_runs(commits)
    # Then
    assert told == [spent.id]


def test_a_run_whose_lease_was_lost_is_left_out_whole_and_the_others_are_committed(
    storage: Storage, committer: Committer, clock: FrozenClock, published: list[str]
) -> None:
    # Given
    with storage.database.begin() as tx:
        lost_run, lost_lease = _held_run(tx, clock, "a")
        kept_run, kept_lease = _held_run(tx, clock, "b")
        commits = [
            RunCommit(lost_run, lost_lease, [_done(tx, lost_run)]),
            RunCommit(kept_run, kept_lease, [_done(tx, kept_run)]),
        ]
        leases.acquire(tx, lost_run.id, worker_id="w", now=clock.now(), expires_at=clock.now())
    # When
    lost = committer.commit_runs(commits)
    # Then
    assert lost == {lost_run.id}
    assert _read(storage, f"{lost_run.id}:0").status == Status.QUEUED
    assert _read(storage, f"{kept_run.id}:0").status == Status.COMPLETED
    assert (_state_seq(storage, lost_run), _state_seq(storage, kept_run)) == (-1, 0)
    assert published == [f"{kept_run.id}:0"]
    with storage.database.read() as tx:
        assert [total.run_id for total in usage_totals.totals(tx)] == [kept_run.id]


@pytest.mark.parametrize("answers", [["after"], ["before"], ["after", "after"], ["before", "after", "before"]])
def test_a_commit_of_unknown_outcome_bills_once(
    storage: Storage, clock: FrozenClock, published: list[str], answers: list[str]
) -> None:
    # Given
    with storage.database.begin() as tx:
        run, lease = _held_run(tx, clock)
        done = _done(tx, run)
    unsure = dataclasses.replace(storage, database=AnswersLost(storage, answers))  # type: ignore[arg-type]
    # When
    lost = Committer(unsure, make_meter(), worker_id="w", publish=published.extend).commit_runs(
        [RunCommit(run, lease, [done])]
    )
    # Then
    assert lost == set()
    assert _state_seq(storage, run) == 0
    assert _read(storage, done.operation.request_id).status == Status.COMPLETED
    assert _num_usage_records(storage) == 1
    assert published == [done.operation.request_id]


def test_a_lease_lost_after_a_commit_of_unknown_outcome_is_told(storage: Storage, clock: FrozenClock) -> None:
    # Given
    with storage.database.begin() as tx:
        run, lease = _held_run(tx, clock)
        done = _done(tx, run)
    unsure = AnswersLost(storage, ["before"])
    opened = dataclasses.replace(storage, database=unsure)  # type: ignore[arg-type]
    real_begin = unsure.begin
    tries = iter([False, True])

    @contextlib.contextmanager
    def begin() -> Iterator[Connection]:
        if next(tries):
            with storage.database.begin() as tx:
                leases.release_worker(tx, "w")
        with real_begin() as tx:
            yield tx

    unsure.begin = begin  # type: ignore[method-assign]
    # When
    lost = Committer(opened, make_meter(), worker_id="w", publish=lambda _: None).commit_runs(
        [RunCommit(run, lease, [done])]
    )
    # Then
    assert lost == {run.id}
    assert _num_usage_records(storage) == 0


def test_a_failed_operation_is_recorded_moves_the_run_on_and_is_not_billed(
    storage: Storage, committer: Committer, clock: FrozenClock
) -> None:
    # Given
    with storage.database.begin() as tx:
        run, lease = _held_run(tx, clock)
        bad = _done(tx, run, 0, Failure("token id 900 is outside the vocabulary"), "forward_backward")
        good = _done(tx, run, 1)
    # When
    committer.commit_runs([RunCommit(run, lease, [bad, good])])
    # Then
    failed = _read(storage, f"{run.id}:0")
    assert (failed.status, failed.failure_number) == (Status.FAILED, 1)
    assert failed.error == "token id 900 is outside the vocabulary"
    assert _state_seq(storage, run) == 1
    assert _num_usage_records(storage) == 1


def test_an_operation_that_had_failed_before_its_turn_only_moves_the_run_on(
    storage: Storage, committer: Committer, clock: FrozenClock, published: list[str]
) -> None:
    # Given
    with storage.database.begin() as tx:
        run, lease = _held_run(tx, clock)
        refused = make_operation(tx, run, 0, refusal=journal.Refusal("bad", "user"))
    # When
    committer.commit_runs([RunCommit(run, lease, [Done(refused, None)])])
    # Then
    assert _state_seq(storage, run) == 0
    assert _read(storage, refused.request_id) == refused
    assert published == []


def test_a_checkpoint_name_that_is_taken_fails_its_save_alone(
    storage: Storage, committer: Committer, clock: FrozenClock
) -> None:
    # Given
    with storage.database.begin() as tx:
        run, lease = _held_run(tx, clock)
        taken = make_checkpoint(tx, run, "same", key="first")
        uploads.announce(tx, "second", now=clock.now(), expires_at=clock.now() + timedelta(days=1))

        def publish(tx: Connection) -> None:
            make_checkpoint(tx, run, "same", key="third")

        save = _done(tx, run, 0, Saved(path=str(taken.path)), "save_state", publish=publish)
        step = _done(tx, run, 1)
    # When
    committer.commit_runs([RunCommit(run, lease, [save, step])])
    # Then
    failed = _read(storage, f"{run.id}:0")
    assert failed.status == Status.FAILED
    assert "save under another name" in str(failed.error)
    assert _read(storage, f"{run.id}:1").status == Status.COMPLETED
    with storage.database.read() as tx:
        found = checkpoints.find(tx, taken.path, now=clock.now())
    assert found is not None
    assert found.object_key == "first"
    assert _num_usage_records(storage) == 1


def test_a_large_outcome_lies_in_the_object_store_and_is_named(
    storage: Storage, committer: Committer, clock: FrozenClock
) -> None:
    # Given
    outcome = OptimStepOutcome({f"metric-{number}": float(number) for number in range(200)})
    with storage.database.begin() as tx:
        run, lease = _held_run(tx, clock)
        done = _done(tx, run, 0, outcome)
    # When
    committer.commit_runs([RunCommit(run, lease, [done])])
    # Then
    operation = _read(storage, done.operation.request_id)
    assert operation.outcome.key is not None
    assert operations.decode(storage.payloads.get(operation.outcome)) == outcome
    with storage.database.begin() as tx:
        assert uploads.take_unwanted(tx, now=clock.now() + timedelta(days=9), limit=5) == []


def test_an_object_store_that_is_away_for_a_while_delays_the_commit(
    storage: Storage, committer: Committer, clock: FrozenClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given
    outcome = OptimStepOutcome({f"metric-{number}": float(number) for number in range(200)})
    with storage.database.begin() as tx:
        run, lease = _held_run(tx, clock)
        done = _done(tx, run, 0, outcome)
    real_put, failures = storage.objects.put, iter([True, True, False])

    def put(key: str, data: bytes) -> object:
        if next(failures):
            raise ObjectStoreUnavailableError("store", "away")
        return real_put(key, data)

    monkeypatch.setattr(storage.objects, "put", put)
    # When
    committer.commit_runs([RunCommit(run, lease, [done])])
    # Then
    assert _read(storage, done.operation.request_id).status == Status.COMPLETED


# ------------------------------------------------------------------------------------------------------------- samples


def _claimed(storage: Storage, clock: FrozenClock) -> tuple[SamplingSession, journal.Operation]:
    with storage.database.begin() as tx:
        session = make_sampling_session(tx)
        make_sample(tx, session)
        expires_at = clock.now() + timedelta(seconds=10)
        (operation,) = claims.claim_samples(
            tx, worker_id="w", limit=1, now=clock.now(), expires_at=expires_at, skip_locked=False
        )
    return session, operation


def _drawn(session: SamplingSession, operation: journal.Operation, outcome: Outcome | None = None) -> SampleCommit:
    return SampleCommit(operation, session, outcome or SampleOutcome(()), make_usage(tokens_sampled=4))


def test_a_drawn_sample_is_completed_and_billed_once(
    storage: Storage, committer: Committer, clock: FrozenClock, published: list[str]
) -> None:
    # Given
    session, operation = _claimed(storage, clock)
    # When
    committer.commit_samples([_drawn(session, operation)])
    # Then
    assert _read(storage, operation.request_id).status == Status.COMPLETED
    assert published == [operation.request_id]
    with storage.database.read() as tx:
        (total,) = usage_totals.totals(tx)
    assert (total.tokens_sampled, total.kind) == (4, "sample")


def test_a_sample_whose_claim_was_lost_is_discarded_with_its_usage(
    storage: Storage, committer: Committer, clock: FrozenClock
) -> None:
    # Given
    session, operation = _claimed(storage, clock)
    clock.advance(11)
    with storage.database.begin() as tx:
        claims.release_claims(tx, now=clock.now())
    # When
    committer.commit_samples([_drawn(session, operation)])
    # Then
    assert _read(storage, operation.request_id).status == Status.QUEUED
    assert _num_usage_records(storage) == 0


def test_two_attempts_at_one_sample_complete_it_once(
    storage: Storage, committer: Committer, clock: FrozenClock
) -> None:
    # Given
    session, first = _claimed(storage, clock)
    clock.advance(11)
    with storage.database.begin() as tx:
        claims.release_claims(tx, now=clock.now())
        expires_at = clock.now() + timedelta(seconds=10)
        (second,) = claims.claim_samples(
            tx, worker_id="w", limit=1, now=clock.now(), expires_at=expires_at, skip_locked=False
        )
    # When
    committer.commit_samples([_drawn(session, first), _drawn(session, second)])
    committer.commit_samples([_drawn(session, first)])
    # Then
    done = _read(storage, first.request_id)
    assert (done.status, done.attempts) == (Status.COMPLETED, 2)
    assert _num_usage_records(storage) == 1


def test_a_cancelled_sample_is_discarded_with_its_usage(
    storage: Storage, committer: Committer, clock: FrozenClock
) -> None:
    # Given
    session, operation = _claimed(storage, clock)
    with storage.database.begin() as tx:
        journal.cancel(tx, operation.request_id, account_id=session.account_id, now=clock.now())
    # When
    committer.commit_samples([_drawn(session, operation)])
    # Then
    assert _read(storage, operation.request_id).status == Status.CANCELLED
    assert _num_usage_records(storage) == 0


def test_a_failed_sample_is_recorded_and_not_billed(
    storage: Storage, committer: Committer, clock: FrozenClock, published: list[str]
) -> None:
    # Given
    session, operation = _claimed(storage, clock)
    # When
    committer.commit_samples([_drawn(session, operation, Failure("the prompt is too long"))])
    # Then
    failed = _read(storage, operation.request_id)
    assert (failed.status, failed.error) == (Status.FAILED, "the prompt is too long")
    assert published == [operation.request_id]
    assert _num_usage_records(storage) == 0


@pytest.mark.parametrize("answers", [["after"], ["before"], ["after", "before"]])
def test_a_samples_commit_of_unknown_outcome_bills_once(
    storage: Storage, clock: FrozenClock, answers: list[str]
) -> None:
    # Given
    session, operation = _claimed(storage, clock)
    unsure = dataclasses.replace(storage, database=AnswersLost(storage, answers))  # type: ignore[arg-type]
    # When
    discarded = Committer(unsure, make_meter(), worker_id="w", publish=lambda _: None).commit_samples(
        [_drawn(session, operation)]
    )
    # Then
    assert discarded == set()
    assert _read(storage, operation.request_id).status == Status.COMPLETED
    assert _num_usage_records(storage) == 1


def test_what_is_lost_says_who_holds_it(storage: Storage, clock: FrozenClock) -> None:
    with storage.database.begin() as tx:
        # Given
        run, lease = _held_run(tx, clock)
        now = clock.now() + timedelta(seconds=11)
        leases.acquire(tx, run.id, worker_id="other", now=now, expires_at=now)
        # When
        with pytest.raises(LeaseLostError) as raised:
            leases.committed_seq(tx, lease)
    # Then
    assert raised.value.holder == "other"
