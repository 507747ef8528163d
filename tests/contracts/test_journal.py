"""What the journal promises, on SQLite and on PostgreSQL: accepted once, in order, claimed by one, closed, expired."""

from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest
from sqlalchemy import Connection

from storage import claims, journal, leases, runs, snapshots
from storage.database import Database
from storage.errors import ClaimLostError, RowNotFoundError
from storage.journal import Amount, Operation, Refusal, Status
from storage.leases import Lease
from storage.payloads import Stored
from storage.runs import Run
from tests.contracts.query_plans import query_plans
from tests.factories import (
    LATER,
    NOW,
    OUTCOME,
    PAYLOAD,
    SHA256,
    complete,
    make_account,
    make_operation,
    make_run,
    make_sample,
    make_sampling_session,
    make_session,
    make_upload,
)

BAD = Refusal("change this", "user")
SOON = NOW + timedelta(seconds=1)


@pytest.fixture
def tx(database: Database) -> Iterator[Connection]:
    """A transaction, since what is tested here neither begins nor ends one."""
    with database.begin() as tx:
        yield tx


@pytest.fixture
def run(tx: Connection) -> Run:
    """A run without operations."""
    return make_run(tx)


def _lease(tx: Connection, run: Run) -> Lease:
    return leases.acquire(tx, run.id, worker_id="w", now=NOW, expires_at=LATER)


def _advance(tx: Connection, run: Run, seq: int) -> None:
    leases.advance(tx, _lease(tx, run), state_seq=seq)


def _release(tx: Connection, run: Run) -> None:
    leases.release_worker(tx, "w")


def _status(tx: Connection, operation: Operation) -> str:
    return journal.get_operation(tx, operation.request_id).status


# ----------------------------------------------------------------------------------------------------------- accepting


def test_an_accepted_operation_waits_with_its_payload(tx: Connection, run: Run) -> None:
    # When
    operation = make_operation(tx, run, 0, "create_model", payload=Stored(inline=b"\x00\xff", size_bytes=2))
    # Then
    assert operation.request_id == f"{run.id}:0"
    assert operation.payload == Stored(inline=b"\x00\xff", size_bytes=2)
    assert (operation.status, operation.attempts, operation.outcome) == (Status.QUEUED, 0, Stored())
    assert operation.accepted_at == NOW
    assert journal.open_by_account(tx) == {run.account_id: Amount(1, 2)}


def test_the_same_seq_again_gives_the_first_request_id_and_changes_nothing(tx: Connection, run: Run) -> None:
    # Given
    first = make_operation(tx, run, 3, "optim_step")
    # When
    request_id, new = journal.accept_training(
        tx,
        account_id=run.account_id,
        run_id=run.id,
        seq=3,
        kind="forward_backward",
        base_model=run.base_model,
        payload=Stored(inline=b"other", size_bytes=5),
        now=LATER,
        refusal=BAD,
        gradients=True,
    )
    # Then
    assert (request_id, new) == (first.request_id, False)
    assert journal.get_operation(tx, request_id) == first
    assert runs.get_run(tx, run.id).num_failures == 0
    assert runs.get_run(tx, run.id).last_request_at == NOW


def test_a_new_operation_is_told_to_be_new(tx: Connection, run: Run) -> None:
    for seq in range(2):
        _, new = journal.accept_training(
            tx,
            account_id=run.account_id,
            run_id=run.id,
            seq=seq,
            kind="forward",
            base_model=run.base_model,
            payload=PAYLOAD,
            now=NOW,
        )
        assert new


def test_a_refused_operation_is_failed_from_the_start_and_its_seq_is_used_up(tx: Connection, run: Run) -> None:
    # When
    operation = make_operation(tx, run, 0, "optim_step", refusal=BAD)
    # Then
    assert (operation.status, operation.error, operation.error_category) == (Status.FAILED, "change this", "user")
    assert operation.finished_at == NOW
    assert operation.failure_number is None
    assert journal.open_by_account(tx) == {}
    assert [op.seq for op in journal.next_in_order(tx, run.id, after_seq=-1, limit=5)] == [0]


def test_failures_of_gradients_are_numbered_and_later_operations_know_how_many_there_were(
    tx: Connection, run: Run
) -> None:
    # Given
    first = make_operation(tx, run, 0, refusal=BAD)
    before = make_operation(tx, run, 1, "optim_step")
    third = make_operation(tx, run, 2)
    journal.fail(tx, third, BAD, worker_id="w", now=NOW)
    # When
    after = make_operation(tx, run, 3, "optim_step")
    # Then
    assert first.failure_number == 1
    assert journal.get_operation(tx, third.request_id).failure_number == 2
    assert (before.failures_seen, after.failures_seen) == (1, 2)
    assert journal.failed_gradients(tx, run.id, before_seq=1) == [(0, 1)]
    assert journal.failed_gradients(tx, run.id, before_seq=3) == [(0, 1), (2, 2)]


def test_failed_gradients_are_those_since_the_last_step_that_was_started(tx: Connection, run: Run) -> None:
    # Given
    make_operation(tx, run, 0, refusal=BAD)
    step = make_operation(tx, run, 1, "optim_step")
    make_operation(tx, run, 2, refusal=BAD)
    _lease(tx, run)
    # When
    journal.start(tx, [step.id], worker_id="w", now=NOW)
    complete(tx, step)
    # Then
    assert journal.failed_gradients(tx, run.id, before_seq=3) == [(2, 2)]


def test_what_waits_is_counted_by_account_until_it_has_an_outcome(tx: Connection, run: Run) -> None:
    # Given: three operations of one account, one of another
    payload = Stored(inline=b"1234", size_bytes=4)
    done, running, _ = [make_operation(tx, run, seq, "optim_step", payload=payload) for seq in range(3)]
    others = make_run(tx, session=make_session(tx, make_account(tx, "others")))
    make_operation(tx, others, 0, "optim_step", payload=payload)
    # When
    journal.start(tx, [done.id, running.id], worker_id="w", now=NOW)
    complete(tx, done)
    # Then
    assert journal.open_by_account(tx) == {run.account_id: Amount(2, 8), others.account_id: Amount(1, 4)}


def test_counting_what_waits_reads_an_index_of_just_that(tx: Connection, run: Run) -> None:
    # Given
    make_operation(tx, run, 0)
    if tx.dialect.name != "sqlite":
        tx.exec_driver_sql("SET LOCAL enable_seqscan = off")  # as it decides where there are many rows
    # When
    with query_plans(tx, "operation") as plans:
        journal.open_by_account(tx)
    # Then
    assert ["ix_operation_open " in plan for plan in plans] == [True]


# ------------------------------------------------------------------------------------------------------ order and ends


def test_the_next_in_order_end_before_the_first_gap(tx: Connection, run: Run) -> None:
    # Given
    for seq in (2, 1, 0, 4, 5):
        make_operation(tx, run, seq)
    # Then
    assert [op.seq for op in journal.next_in_order(tx, run.id, after_seq=-1, limit=10)] == [0, 1, 2]
    assert [op.seq for op in journal.next_in_order(tx, run.id, after_seq=-1, limit=2)] == [0, 1]
    assert [op.seq for op in journal.next_in_order(tx, run.id, after_seq=1, limit=10)] == [2]
    assert journal.next_in_order(tx, run.id, after_seq=2, limit=10) == []
    assert [op.seq for op in journal.next_in_order(tx, run.id, after_seq=3, limit=10)] == [4, 5]


def test_operations_of_another_run_are_not_in_the_order(tx: Connection, run: Run) -> None:
    # Given
    make_operation(tx, run, 0)
    make_operation(tx, make_run(tx), 1)
    # Then
    assert [op.run_id for op in journal.next_in_order(tx, run.id, after_seq=-1, limit=10)] == [run.id]


def test_a_completed_operation_has_its_outcome_and_no_second_one(tx: Connection, run: Run) -> None:
    # Given
    operation = make_operation(tx, run)
    _lease(tx, run)
    journal.start(tx, [operation.id], worker_id="w", now=SOON)
    # When
    complete(tx, operation, at=LATER)
    # Then
    done = journal.get_operation(tx, operation.request_id)
    assert (done.status, done.outcome, done.attempts, done.worker_id) == (Status.COMPLETED, OUTCOME, 1, "w")
    assert (done.started_at, done.finished_at) == (SOON, LATER)
    with pytest.raises(AssertionError, match="had an outcome already"):
        complete(tx, operation)
    with pytest.raises(AssertionError, match="had an outcome already"):
        journal.fail(tx, operation, BAD, worker_id="w", now=NOW)
    journal.start(tx, [operation.id], worker_id="w2", now=LATER)
    assert journal.get_operation(tx, operation.request_id) == done


def test_only_the_account_finds_its_operation(tx: Connection, run: Run) -> None:
    # Given
    operation = make_operation(tx, run)
    # Then
    assert journal.find_operation(tx, operation.request_id, account_id=run.account_id) == operation
    assert journal.find_operation(tx, operation.request_id, account_id="another") is None
    with pytest.raises(RowNotFoundError):
        journal.get_operation(tx, operation.request_id, account_id="another")


def test_those_that_are_finished_are_found_among_very_many(tx: Connection, run: Run) -> None:
    # Given
    done = make_operation(tx, run, 0)
    complete(tx, done)
    make_operation(tx, run, 1)
    refused = make_operation(tx, run, 2, refusal=BAD)
    # When
    asked = [f"none:{number}" for number in range(70_000)] + [f"{run.id}:{seq}" for seq in range(3)]
    # Then
    assert sorted(journal.finished_among(tx, asked)) == [done.request_id, refused.request_id]


# ------------------------------------------------------------------------------------------------------------- samples


def _claim(tx: Connection, worker_id: str = "w", *, limit: int = 10, expires_in_s: int = 10) -> list[Operation]:
    expires_at = NOW + timedelta(seconds=expires_in_s)
    return list(
        claims.claim_samples(tx, worker_id=worker_id, limit=limit, now=NOW, expires_at=expires_at, skip_locked=False)
    )


def test_samples_are_claimed_oldest_first_and_once(tx: Connection) -> None:
    # Given
    sampling = make_sampling_session(tx)
    samples = [make_sample(tx, sampling, seq) for seq in (5, 1, 3)]
    assert claims.samples_wait(tx)
    # When
    first, second, third = _claim(tx, "a", limit=2), _claim(tx, "b"), _claim(tx, "c")
    # Then
    assert [op.id for op in first] == [samples[0].id, samples[1].id]
    assert [op.id for op in second] == [samples[2].id]
    assert third == []
    assert [(op.status, op.worker_id, op.attempts) for op in second] == [(Status.RUNNING, "b", 1)]
    assert not claims.samples_wait(tx)


def _queue(tx: Connection, account: str, num: int) -> list[Operation]:
    sampling = make_sampling_session(tx, make_session(tx, make_account(tx, account)))
    return [make_sample(tx, sampling, seq) for seq in range(num)]


def test_every_account_that_waits_gets_its_share_of_the_claims(tx: Connection) -> None:
    # Given
    many, few, one = _queue(tx, "many", 20), _queue(tx, "few", 3), _queue(tx, "one", 1)
    # When
    claimed = _claim(tx, limit=9)
    # Then three each, and what one account leaves goes to the oldest
    assert [op.id for op in claimed] == [op.id for op in (*many[:5], *few, *one)]


def test_claims_one_at_a_time_go_to_the_account_with_the_fewest_running(tx: Connection) -> None:
    # Given
    _queue(tx, "many", 20)
    _claim(tx, limit=4)
    late = _queue(tx, "late", 6)
    # When
    claimed = [_claim(tx, limit=1)[0] for _ in range(4)]
    # Then
    assert [op.id for op in claimed] == [op.id for op in late[:4]]
    assert {op.account_id for op in _claim(tx, limit=2)} == {late[0].account_id, make_account(tx, "many").id}


def test_more_accounts_than_claims_share_them_in_the_order_in_which_they_came(tx: Connection) -> None:
    # Given
    queues = [_queue(tx, f"account {number}", 2) for number in range(4)]
    # When
    claimed = [[op.id for op in _claim(tx, limit=3)] for _ in range(3)]
    # Then
    first, second = [queue[0].id for queue in queues], [queue[1].id for queue in queues]
    assert claimed[0] == first[:3]
    assert claimed[1] == sorted([first[3], *second[:2]])
    assert claimed[2] == second[2:]


def test_a_training_operation_is_never_claimed_as_a_sample(tx: Connection, run: Run) -> None:
    # Given
    make_operation(tx, run)
    # Then
    assert _claim(tx) == []
    assert not claims.samples_wait(tx)


def test_a_claim_stands_until_it_is_released(tx: Connection) -> None:
    # Given
    make_sample(tx, make_sampling_session(tx))
    (claimed,) = _claim(tx, expires_in_s=10)
    # When
    early = claims.release_claims(tx, now=NOW + timedelta(seconds=9))
    claims.check_claim(tx, claimed, worker_id="w")
    # Then
    assert early == 0
    with pytest.raises(ClaimLostError):
        claims.check_claim(tx, claimed, worker_id="another")


def test_an_expired_claim_goes_to_another_attempt_and_the_first_is_lost(tx: Connection) -> None:
    # Given
    make_sample(tx, make_sampling_session(tx))
    (slow,) = _claim(tx, "slow", expires_in_s=10)
    # When
    assert claims.release_claims(tx, now=NOW + timedelta(seconds=11)) == 1
    with pytest.raises(ClaimLostError):
        claims.check_claim(tx, slow, worker_id="slow")
    (again,) = _claim(tx, "slow")
    # Then
    assert again.attempts == 2
    claims.check_claim(tx, again, worker_id="slow")
    with pytest.raises(ClaimLostError):
        claims.check_claim(tx, slow, worker_id="slow")


def test_a_renewed_claim_lasts_longer(tx: Connection) -> None:
    # Given
    make_sample(tx, make_sampling_session(tx))
    (claimed,) = _claim(tx, expires_in_s=10)
    # When
    claims.renew_claims(tx, [claimed.id], worker_id="w", expires_at=LATER)
    # Then
    assert claims.release_claims(tx, now=NOW + timedelta(seconds=60)) == 0
    assert claims.release_claims(tx, now=LATER + timedelta(seconds=1)) == 1


def test_a_claim_that_is_given_back_was_no_attempt(tx: Connection) -> None:
    # Given
    sampling = make_sampling_session(tx)
    back, kept = make_sample(tx, sampling, 0), make_sample(tx, sampling, 1)
    claimed = _claim(tx)
    # When
    claims.give_back(tx, [one for one in claimed if one.id == back.id], worker_id="w")
    # Then
    assert (_status(tx, back), _status(tx, kept)) == (Status.QUEUED, Status.RUNNING)
    assert claims.release_claims(tx, now=NOW + timedelta(seconds=11)) == 1
    left = journal.get_operation(tx, back.request_id)
    assert (left.attempts, left.suspect, left.blame) == (0, False, 0)
    assert [one.attempts for one in _claim(tx, "another") if one.id == back.id] == [1]


@pytest.mark.parametrize("worker_id", ["w", "another"])
def test_a_claim_that_does_not_stand_any_more_is_not_given_back(tx: Connection, worker_id: str) -> None:
    # Given
    sample = make_sample(tx, make_sampling_session(tx))
    (lost,) = _claim(tx)
    claims.release_claims(tx, now=NOW + timedelta(seconds=11))
    _claim(tx, worker_id)
    # When
    claims.give_back(tx, [lost], worker_id="w")
    # Then
    left = journal.get_operation(tx, sample.request_id)
    assert (left.status, left.worker_id, left.attempts) == (Status.RUNNING, worker_id, 2)


def test_a_cancelled_sample_that_is_given_back_stays_cancelled(tx: Connection) -> None:
    # Given
    sampling = make_sampling_session(tx)
    sample = make_sample(tx, sampling)
    claimed = _claim(tx)
    journal.cancel(tx, sample.request_id, account_id=sampling.account_id, now=NOW)
    # When
    claims.give_back(tx, claimed, worker_id="w")
    # Then
    assert _status(tx, sample) == Status.CANCELLED


def test_all_claims_of_a_dead_worker_are_released_and_no_others(tx: Connection) -> None:
    # Given
    sampling = make_sampling_session(tx)
    mine, others = make_sample(tx, sampling, 0), make_sample(tx, sampling, 1)
    _claim(tx, "dead", limit=1)
    _claim(tx, "alive")
    # When
    released = claims.release_claims(tx, now=NOW, worker_id="dead")
    # Then
    assert released == 1
    assert (_status(tx, mine), _status(tx, others)) == (Status.QUEUED, Status.RUNNING)


def test_a_cancelled_sample_is_final_and_only_its_account_cancels_it(tx: Connection) -> None:
    # Given
    sampling = make_sampling_session(tx)
    sample = make_sample(tx, sampling)
    (claimed,) = _claim(tx)
    # When
    assert not journal.cancel(tx, sample.request_id, account_id="another", now=NOW)
    assert journal.cancel(tx, sample.request_id, account_id=sampling.account_id, now=NOW)
    # Then
    assert not journal.cancel(tx, sample.request_id, account_id=sampling.account_id, now=NOW)
    assert _status(tx, sample) == Status.CANCELLED
    with pytest.raises(ClaimLostError):
        claims.check_claim(tx, claimed, worker_id="w")
    assert claims.release_claims(tx, now=LATER) == 0


def test_a_training_operation_cannot_be_cancelled(tx: Connection, run: Run) -> None:
    # Given
    operation = make_operation(tx, run)
    # When
    cancelled = journal.cancel(tx, operation.request_id, account_id=run.account_id, now=NOW)
    # Then
    assert not cancelled
    assert _status(tx, operation) == Status.QUEUED


def test_queued_samples_are_found_without_reading_what_else_is_queued(tx: Connection) -> None:
    # Given
    if tx.dialect.name != "sqlite":
        tx.exec_driver_sql("SET LOCAL enable_seqscan = off")  # as it decides where there are many rows
    _queue(tx, "a", 2)
    _queue(tx, "b", 2)
    # When
    with query_plans(tx, "operation") as plans:
        claims.samples_wait(tx)
        _claim(tx, limit=3)
    # Then every query but the one that reads what was claimed
    assert ["ix_operation_open_samples" in plan for plan in plans] == [True] * 6 + [False]


def test_suspect_samples_are_found_without_reading_the_queue(tx: Connection) -> None:
    # Given
    if tx.dialect.name != "sqlite":
        tx.exec_driver_sql("SET LOCAL enable_seqscan = off")
    _queue(tx, "a", 2)
    # When
    with query_plans(tx, "operation") as plans:
        assert not claims.samples_wait(tx, suspect=True)
        expires_at = NOW + timedelta(seconds=10)
        assert claims.claim_suspect(tx, worker_id="w", now=NOW, expires_at=expires_at, skip_locked=False) is None
    # Then
    assert ["ix_operation_suspect_samples" in plan for plan in plans] == [True, True]


def test_old_outcomes_are_found_without_reading_those_that_are_forgotten(tx: Connection) -> None:
    if tx.dialect.name != "sqlite":  # as it decides where there are many rows
        tx.exec_driver_sql("SET LOCAL enable_seqscan = off")
        tx.exec_driver_sql("SET LOCAL enable_sort = off")
    with query_plans(tx, "operation") as plans:
        journal.outcomes_to_expire(tx, finished_before=SOON, limit=5)
    assert "ix_operation_finished" in plans[0]


# ------------------------------------------------------------------------------------------------------------- stalled


def _stalled(tx: Connection, *, now: datetime = LATER, accepted_before: datetime = SOON) -> list[str]:
    return [run.id for run in journal.stalled_runs(tx, now=now, accepted_before=accepted_before, limit=5)]


def test_a_run_whose_next_operation_waits_unheld_is_stalled(tx: Connection, run: Run) -> None:
    # Given
    make_operation(tx, run, 0, accepted_at=NOW)
    # Then
    assert _stalled(tx) == [run.id]
    assert _stalled(tx, accepted_before=NOW) == []


def test_a_held_run_that_works_is_stalled_only_once_its_lease_has_expired(tx: Connection, run: Run) -> None:
    # Given
    operation = make_operation(tx, run, 0)
    _lease(tx, run)
    journal.start(tx, [operation.id], worker_id="w", now=NOW)
    # Then
    assert _stalled(tx) == []
    after = LATER + timedelta(seconds=1)
    assert _stalled(tx, now=after) == [run.id]


def test_a_held_run_whose_holder_has_not_begun_is_stalled_too(tx: Connection, run: Run) -> None:
    # Given
    make_operation(tx, run, 0)
    lease = _lease(tx, run)
    # When
    (stalled,) = journal.stalled_runs(tx, now=LATER, accepted_before=SOON, limit=5)
    # Then
    assert stalled == journal.StalledRun(run.id, state_seq=-1, lease_epoch=lease.epoch, held=True)
    assert _stalled(tx, accepted_before=NOW) == []


def test_a_run_that_waits_for_a_missing_seq_or_for_nothing_is_not_stalled(tx: Connection, run: Run) -> None:
    # Given
    make_operation(tx, run, 1)
    idle = make_run(tx)
    complete(tx, make_operation(tx, idle))
    _advance(tx, idle, 0)
    _release(tx, idle)
    # Then
    assert _stalled(tx) == []


def test_a_failed_operation_in_front_of_waiting_ones_stalls_its_run_too(tx: Connection, run: Run) -> None:
    # Given
    make_operation(tx, run, 0, refusal=BAD)
    make_operation(tx, run, 1)
    # Then
    assert _stalled(tx) == [run.id]


# ---------------------------------------------------------------------------------------------------------------- gaps


def test_a_missing_seq_in_front_of_one_that_waits_too_long_is_a_gap(tx: Connection, run: Run) -> None:
    # Given
    for seq in (0, 1, 4, 6):
        make_operation(tx, run, seq)
    # Then
    assert journal.gaps(tx, accepted_before=SOON, limit=5) == [(run.id, 2, 4)]
    assert journal.gaps(tx, accepted_before=NOW, limit=5) == []
    assert journal.first_missing(tx, run.id) == 2


def test_only_what_is_missing_before_an_operation_keeps_it_waiting(tx: Connection, run: Run) -> None:
    # Given
    for seq in (0, 1, 3, 4, 6):
        make_operation(tx, run, seq)
    complete(tx, journal.get_operation(tx, f"{run.id}:0"))
    _advance(tx, run, 0)
    # Then
    assert [journal.first_missing(tx, run.id, up_to=seq) for seq in (0, 1, 3, 4, 6)] == [None, None, 2, 2, 2]


def test_a_gap_after_the_committed_state_is_found(tx: Connection, run: Run) -> None:
    # Given
    for seq in (0, 1, 2, 5):
        make_operation(tx, run, seq)
    for seq in (0, 1, 2):
        complete(tx, journal.get_operation(tx, f"{run.id}:{seq}"))
    _advance(tx, run, 2)
    # Then
    assert journal.gaps(tx, accepted_before=SOON, limit=5) == [(run.id, 3, 5)]


def test_the_first_seq_of_all_may_be_the_missing_one(tx: Connection, run: Run) -> None:
    # Given
    make_operation(tx, run, 1)
    # Then
    assert journal.gaps(tx, accepted_before=SOON, limit=5) == [(run.id, 0, 1)]


def test_only_what_waits_counts_not_what_has_failed_or_came_late(tx: Connection, run: Run) -> None:
    # Given a failed and a late operation after the missing seq 1
    make_operation(tx, run, 0)
    make_operation(tx, run, 2, refusal=BAD)
    make_operation(tx, run, 3, accepted_at=LATER)
    # Then
    assert journal.gaps(tx, accepted_before=SOON, limit=5) == []
    # When an old one waits behind them
    make_operation(tx, run, 5)
    # Then everything that is missing before it is closed
    assert journal.gaps(tx, accepted_before=SOON, limit=5) == [(run.id, 1, 5)]


def test_a_run_without_gap_has_none_however_long_it_waits(tx: Connection, run: Run) -> None:
    # Given
    for seq in range(3):
        make_operation(tx, run, seq)
    make_sample(tx, make_sampling_session(tx), 7)
    # Then
    assert journal.gaps(tx, accepted_before=LATER, limit=5) == []
    assert journal.first_missing(tx, run.id) is None


def test_gaps_are_found_in_pages(tx: Connection) -> None:
    # Given
    session = make_session(tx)
    for place in range(3):
        make_operation(tx, make_run(tx, session=session, model_seq_id=place), 1)
    # Then
    assert len(journal.gaps(tx, accepted_before=SOON, limit=2)) == 2


def test_a_closed_gap_is_a_numbered_failure_and_closing_it_again_changes_nothing(tx: Connection, run: Run) -> None:
    # Given
    make_operation(tx, run, 1)
    # When
    assert journal.close_gap(tx, run.id, 0, error="never arrived", now=LATER)
    assert not journal.close_gap(tx, run.id, 0, error="again", now=LATER)
    assert not journal.close_gap(tx, run.id, 1, error="it is there", now=LATER)
    # Then
    closed = journal.get_operation(tx, f"{run.id}:0")
    assert (closed.kind, closed.status, closed.error) == ("gap", Status.FAILED, "never arrived")
    assert closed.failure_number == 1
    assert [op.seq for op in journal.next_in_order(tx, run.id, after_seq=-1, limit=5)] == [0, 1]
    assert journal.gaps(tx, accepted_before=LATER, limit=5) == []


def test_a_seq_that_arrives_after_its_gap_was_closed_gets_the_stored_error(tx: Connection, run: Run) -> None:
    # Given
    make_operation(tx, run, 1)
    journal.close_gap(tx, run.id, 0, error="never arrived", now=LATER)
    # When
    late = make_operation(tx, run, 0)
    # Then
    assert (late.status, late.error) == (Status.FAILED, "never arrived")


# -------------------------------------------------------------------------------------------------------------- ageing


def _finished(tx: Connection, run: Run, seq: int, key: str) -> Operation:
    operation = make_operation(tx, run, seq, payload=Stored(key=f"payload-{key}", size_bytes=9))
    complete(tx, operation, outcome=Stored(key=f"outcome-{key}", size_bytes=9))
    return operation


def _snapshot(tx: Connection, run: Run, seq: int) -> None:
    key = make_upload(tx, f"snapshot-{run.id}-{seq}")
    lease = _lease(tx, run)
    snapshots.add(tx, lease, seq=seq, object_key=key, data_sha256=SHA256, size_bytes=1, now=NOW)


def _expire(tx: Connection, *, limit: int = 10) -> journal.Expired:
    old = journal.outcomes_to_expire(tx, finished_before=SOON, limit=limit)
    return journal.expire_outcomes(tx, old)


def test_outcomes_up_to_the_second_newest_snapshot_are_forgotten_and_the_replay_tail_stays(
    tx: Connection, run: Run
) -> None:
    # Given
    operations = [_finished(tx, run, seq, str(seq)) for seq in range(4)]
    for seq in (0, 1, 3):
        _snapshot(tx, run, seq)
    # When
    expired = _expire(tx)
    # Then
    assert sorted(expired.object_keys) == ["outcome-0", "outcome-1", "payload-0", "payload-1"]
    assert expired.outcomes == 2
    read = [journal.get_operation(tx, operation.request_id) for operation in operations]
    assert [operation.expired for operation in read] == [True, True, False, False]
    assert (read[0].payload.key, read[0].outcome.key, read[0].status) == (None, None, Status.COMPLETED)
    assert read[2].outcome.key == "outcome-2"
    assert _expire(tx).outcomes == 0


def test_a_run_with_one_snapshot_keeps_everything(tx: Connection, run: Run) -> None:
    # Given
    _finished(tx, run, 0, "0")
    _snapshot(tx, run, 0)
    # Then
    assert _expire(tx).outcomes == 0


def test_samples_are_forgotten_by_age_alone_and_in_pages(tx: Connection) -> None:
    # Given
    sampling = make_sampling_session(tx)
    for seq in range(3):
        complete(tx, make_sample(tx, sampling, seq), at=NOW)
    complete(tx, make_sample(tx, sampling, 3), at=LATER)
    make_sample(tx, sampling, 4)
    # Then
    counts = [_expire(tx, limit=2).outcomes for _ in range(3)]
    assert counts == [2, 1, 0]
    assert not journal.get_operation(tx, f"{sampling.id}:3").expired


def test_expired_operations_tell_which_weights_they_had_loaded(tx: Connection, run: Run) -> None:
    # Given
    complete(tx, make_operation(tx, run, 0, "load_state", loads_key="weights"))
    second = make_operation(tx, run, 1, "load_state")
    journal.record_load(tx, second, "others")
    complete(tx, second)
    for seq in (1, 2):
        _snapshot(tx, run, seq)
    # When
    expired = _expire(tx)
    # Then
    assert sorted(expired.loads_keys) == ["others", "weights"]
