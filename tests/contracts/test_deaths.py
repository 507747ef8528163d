"""What a worker's death is held against, on SQLite and on PostgreSQL: suspects, blame, and whom it does not touch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta

import pytest
from sqlalchemy import Connection

from storage import claims, deaths, journal, leases, replays, suspects, workers
from storage.database import Database
from storage.deaths import Freed
from storage.journal import Operation, Status
from storage.leases import Lease
from storage.runs import Run, get_run
from storage.suspects import Cause
from tests.factories import LATER, NOW, complete, make_operation, make_run, make_sample, make_sampling_session

AFTER = LATER + timedelta(seconds=1)
DEADLY = (Cause.FAULT, Cause.OUT_OF_MEMORY, Cause.UNKNOWN, Cause.HAND)


@pytest.fixture
def tx(database: Database) -> Iterator[Connection]:
    """A transaction that is committed."""
    with database.begin() as tx:
        yield tx


def _lease(tx: Connection, run: Run, worker_id: str = "w") -> Lease:
    return leases.acquire(tx, run.id, worker_id=worker_id, now=NOW, expires_at=LATER)


def _start(tx: Connection, operations: Sequence[Operation], worker_id: str = "w") -> None:
    ids = [operation.id for operation in operations]
    journal.start(tx, ids, worker_id=worker_id, now=NOW, alone=len(ids) == 1)


def _claim(tx: Connection, worker_id: str = "w") -> Sequence[Operation]:
    claimed = claims.claim_samples(tx, worker_id=worker_id, limit=10, now=NOW, expires_at=LATER, skip_locked=False)
    if claimed:
        return claimed
    suspect = claims.claim_suspect(tx, worker_id=worker_id, now=NOW, expires_at=LATER, skip_locked=False)
    return [] if suspect is None else [suspect]


def _die(tx: Connection, cause: Cause, worker_id: str = "w") -> Freed:
    return deaths.note_death(tx, worker_id, cause, now=NOW)


def _now(tx: Connection, operation: Operation) -> Operation:
    return journal.get_operation(tx, operation.request_id)


def _die_alone(tx: Connection, run: Run, operation: Operation, cause: Cause) -> None:
    _lease(tx, run)
    _start(tx, [operation])
    _die(tx, cause)


# ------------------------------------------------------------------------------------------------------------- suspects


@pytest.mark.parametrize("cause", DEADLY)
def test_members_of_the_batch_that_a_worker_died_with_become_suspects_and_wait_again(
    tx: Connection, cause: Cause
) -> None:
    # Given
    run, other = make_run(tx), make_run(tx)
    first, second, behind = make_operation(tx, run), make_operation(tx, other), make_operation(tx, run, 1)
    held = _lease(tx, run)
    _lease(tx, other)
    _start(tx, [first, second])
    # When
    freed = _die(tx, cause)
    # Then
    assert (sorted(freed.runs), freed.num_samples) == (sorted([run.id, other.id]), 0)
    for operation in (first, second):
        left = _now(tx, operation)
        assert (left.status, left.suspect, left.alone, left.blame) == (Status.QUEUED, True, False, 0)
    assert not _now(tx, behind).suspect
    assert not leases.is_held(tx, held)


def test_what_was_done_before_the_death_stays_done(tx: Connection) -> None:
    # Given
    run = make_run(tx)
    operation = make_operation(tx, run)
    lease = _lease(tx, run)
    _start(tx, [operation])
    leases.advance(tx, lease, state_seq=0)
    complete(tx, operation)
    # When
    _die(tx, Cause.FAULT)
    # Then
    assert (_now(tx, operation).status, _now(tx, operation).suspect) == (Status.COMPLETED, False)


def test_samples_that_waited_for_a_training_pass_are_innocent_of_its_end(tx: Connection) -> None:
    # Given
    run = make_run(tx)
    operation, sample = make_operation(tx, run), make_sample(tx, make_sampling_session(tx))
    _lease(tx, run)
    _claim(tx)
    _start(tx, [operation])
    # When
    freed = _die(tx, Cause.FAULT)
    # Then
    assert freed.num_samples == 1
    assert _now(tx, operation).suspect
    assert (_now(tx, sample).status, _now(tx, sample).suspect) == (Status.QUEUED, False)


@pytest.mark.parametrize("cause", [Cause.FAULT, Cause.OUT_OF_MEMORY])
def test_samples_that_a_worker_crashed_with_become_suspects(tx: Connection, cause: Cause) -> None:
    # Given
    sample = make_sample(tx, make_sampling_session(tx))
    _claim(tx)
    # When
    freed = _die(tx, cause)
    # Then
    assert freed.num_samples == 1
    assert (_now(tx, sample).status, _now(tx, sample).suspect) == (Status.QUEUED, True)


@pytest.mark.parametrize("cause", [Cause.UNKNOWN, Cause.HAND])
def test_samples_become_suspects_at_the_second_death_that_points_at_nobody(tx: Connection, cause: Cause) -> None:
    # Given
    sample = make_sample(tx, make_sampling_session(tx))
    # When
    suspected = []
    for _ in range(2):
        _claim(tx)
        _die(tx, cause)
        suspected.append(_now(tx, sample).suspect)
    # Then
    assert suspected == [False, True]


def test_nobody_is_suspected_when_a_worker_stops(tx: Connection) -> None:
    # Given
    run = make_run(tx)
    operation, sample = make_operation(tx, run), make_sample(tx, make_sampling_session(tx))
    for _ in range(3):
        _lease(tx, run)
        _claim(tx)
        _start(tx, [operation])
        # When
        _die(tx, Cause.STOPPED)
    # Then
    for left in (_now(tx, operation), _now(tx, sample)):
        assert (left.status, left.suspect, left.blame) == (Status.QUEUED, False, 0)


def test_operations_of_another_worker_are_not_touched(tx: Connection) -> None:
    # Given
    run, elsewhere = make_run(tx), make_run(tx)
    operation = make_operation(tx, elsewhere)
    sample = make_sample(tx, make_sampling_session(tx))
    _lease(tx, run, "dead")
    _lease(tx, elsewhere, "alive")
    _start(tx, [operation], "alive")
    _claim(tx, "alive")
    # When
    freed = _die(tx, Cause.FAULT, "dead")
    # Then
    assert freed == Freed([run.id], 0)
    for untouched in (_now(tx, operation), _now(tx, sample)):
        assert (untouched.status, untouched.suspect, untouched.worker_id) == (Status.RUNNING, False, "alive")


# ---------------------------------------------------------------------------------------------------------------- blame


@pytest.mark.parametrize(
    ("cause", "bound"), [(Cause.FAULT, 3), (Cause.OUT_OF_MEMORY, 3), (Cause.UNKNOWN, 10), (Cause.HAND, 60)]
)
def test_only_so_many_deaths_alone_condemn_an_operation(tx: Connection, cause: Cause, bound: int) -> None:
    # Given
    run = make_run(tx)
    operation = make_operation(tx, run)
    condemned = []
    # When
    for _ in range(bound):
        _die_alone(tx, run, operation, cause)
        condemned.append(suspects.is_condemned(_now(tx, operation).blame))
    # Then
    assert condemned == [False] * (bound - 1) + [True]
    assert f"ended its worker {bound} times while it ran alone" in suspects.sentence(_now(tx, operation).blame)


def test_a_suspect_sample_that_is_alone_is_blamed(tx: Connection) -> None:
    # Given
    sample = make_sample(tx, make_sampling_session(tx))
    # When
    for _ in range(4):
        _claim(tx)
        _die(tx, Cause.FAULT)
    # Then
    assert suspects.deaths_alone(_now(tx, sample).blame)[Cause.FAULT] == 3


def test_deaths_in_company_condemn_nobody(tx: Connection) -> None:
    # Given
    run, other = make_run(tx), make_run(tx)
    members = [make_operation(tx, run), make_operation(tx, other)]
    # When
    for _ in range(100):
        _lease(tx, run)
        _lease(tx, other)
        _start(tx, members)
        _die(tx, Cause.FAULT)
    # Then
    assert [_now(tx, member).blame for member in members] == [0, 0]


def test_fifty_kills_around_an_innocent_operation_fail_nothing(tx: Connection) -> None:
    # Given
    run = make_run(tx)
    operation = make_operation(tx, run)
    # When
    for _ in range(50):
        _die_alone(tx, run, operation, Cause.HAND)
    # Then
    left = _now(tx, operation)
    assert (left.status, suspects.is_condemned(left.blame)) == (Status.QUEUED, False)


def test_causes_add_up_and_the_error_tells_them_apart(tx: Connection) -> None:
    # Given
    run = make_run(tx)
    operation = make_operation(tx, run)
    # When
    for cause in (Cause.FAULT, Cause.OUT_OF_MEMORY, Cause.UNKNOWN, *[Cause.HAND] * 13):
        _die_alone(tx, run, operation, cause)
    before = _now(tx, operation).blame
    _die_alone(tx, run, operation, Cause.HAND)
    after = _now(tx, operation).blame
    # Then
    assert [suspects.is_condemned(blame) for blame in (before, after)] == [False, True]
    words = suspects.sentence(after)
    assert "17 times" in words
    assert "1 x it ran out of memory" in words
    assert "14 x it was killed by a signal" in words
    assert "fewer or shorter datums" in words


# ------------------------------------------------------------------------------------------ deaths that nobody has seen


def test_whoever_takes_an_expired_lease_suspects_what_was_left_running(tx: Connection) -> None:
    # Given
    run = make_run(tx)
    first, second, behind = (make_operation(tx, run, seq) for seq in range(3))
    _lease(tx, run, "gone")
    _start(tx, [first, second], "gone")
    # When
    leases.acquire(tx, run.id, worker_id="w", now=AFTER, expires_at=AFTER)
    # Then
    assert [_now(tx, operation).suspect for operation in (first, second, behind)] == [True, True, False]
    assert [_now(tx, operation).status for operation in (first, second)] == [Status.QUEUED] * 2


def test_an_expired_lease_counts_as_a_death_of_unknown_cause_for_what_ran_alone(tx: Connection) -> None:
    # Given
    run = make_run(tx)
    operation = make_operation(tx, run)
    _lease(tx, run, "gone")
    _start(tx, [operation], "gone")
    # When
    leases.acquire(tx, run.id, worker_id="w", now=AFTER, expires_at=AFTER)
    # Then
    assert dict(suspects.deaths_alone(_now(tx, operation).blame)) == {
        Cause.HAND: 0,
        Cause.UNKNOWN: 1,
        Cause.OUT_OF_MEMORY: 0,
        Cause.FAULT: 0,
    }


def test_an_expired_claim_counts_as_a_death_of_unknown_cause(tx: Connection) -> None:
    # Given
    sample = make_sample(tx, make_sampling_session(tx))
    blames = []
    # When
    for _ in range(4):
        _claim(tx)
        claims.release_claims(tx, now=AFTER)
        blames.append(suspects.deaths_alone(_now(tx, sample).blame)[Cause.UNKNOWN])
    # Then
    assert blames == [0, 0, 1, 2]


def test_a_run_that_was_given_up_leaves_no_suspect(tx: Connection) -> None:
    # Given
    run = make_run(tx)
    operation = make_operation(tx, run)
    lease = _lease(tx, run)
    _start(tx, [operation])
    # When
    leases.release(tx, lease)
    _lease(tx, run, "another")
    # Then
    left = _now(tx, operation)
    assert (left.status, left.suspect, left.alone, left.blame) == (Status.QUEUED, False, False, 0)


def test_a_death_is_noted_once_however_often_it_is_told(tx: Connection) -> None:
    # Given
    run = make_run(tx)
    operation = make_operation(tx, run)
    workers.register(tx, worker_id="w", host="h", pid=1, device="cpu", now=NOW)
    _lease(tx, run)
    _start(tx, [operation])
    # When
    first, second = _die(tx, Cause.FAULT), _die(tx, Cause.HAND)
    # Then
    assert (first, second) == (Freed([run.id], 0), Freed([], 0))
    assert suspects.deaths_alone(_now(tx, operation).blame)[Cause.FAULT] == 1
    assert suspects.deaths_alone(_now(tx, operation).blame)[Cause.HAND] == 0
    assert workers.find_worker(tx, "w").ended_by == Cause.FAULT  # type: ignore[union-attr]


def test_a_worker_that_lost_its_lease_does_not_write_itself_down(tx: Connection) -> None:
    # Given
    run = make_run(tx)
    operation = make_operation(tx, run)
    _lease(tx, run, "zombie")
    leases.acquire(tx, run.id, worker_id="w", now=AFTER, expires_at=AFTER)
    _start(tx, [operation])
    # When
    _start(tx, [operation], "zombie")
    _die(tx, Cause.FAULT, "zombie")
    # Then
    left = _now(tx, operation)
    assert (left.worker_id, left.attempts, left.status, left.blame) == ("w", 1, Status.RUNNING, 0)


# -------------------------------------------------------------------------------------------------------------- replays


def _replay(tx: Connection, run: Run, worker_id: str = "w") -> Lease:
    lease = _lease(tx, run, worker_id)
    replays.begin(tx, lease)
    return lease


def _suspicion(tx: Connection, run: Run) -> tuple[str | None, bool, int]:
    now = get_run(tx, run.id)
    return now.replayed_by, now.replays_alone, sum(suspects.deaths_alone(now.replay_blame).values())


@pytest.mark.parametrize("cause", DEADLY)
def test_a_run_that_was_being_replayed_is_replayed_alone_from_then_on(tx: Connection, cause: Cause) -> None:
    # Given
    run, other = make_run(tx), make_run(tx)
    _replay(tx, run)
    _lease(tx, other)
    # When
    _die(tx, cause)
    # Then
    assert _suspicion(tx, run) == (None, True, 0)
    assert _suspicion(tx, other) == (None, False, 0)


@pytest.mark.parametrize(
    ("cause", "bound"), [(Cause.FAULT, 3), (Cause.OUT_OF_MEMORY, 3), (Cause.UNKNOWN, 10), (Cause.HAND, 60)]
)
def test_only_so_many_deaths_condemn_a_replay(tx: Connection, cause: Cause, bound: int) -> None:
    # Given
    run = make_run(tx)
    condemned = []
    # When
    for _ in range(1 + bound):
        _replay(tx, run)
        _die(tx, cause)
        condemned.append(suspects.is_condemned(get_run(tx, run.id).replay_blame))
    # Then
    assert condemned == [False] * bound + [True]
    assert f"ended its worker {bound} times while it ran alone" in replays.sentence(get_run(tx, run.id).replay_blame)


def test_a_replay_that_comes_to_its_end_is_above_suspicion(tx: Connection) -> None:
    # Given
    run = make_run(tx)
    for _ in range(3):
        _replay(tx, run)
        _die(tx, Cause.FAULT)
    # When
    lease = _replay(tx, run)
    replays.end(tx, lease)
    # Then
    assert _suspicion(tx, run) == (None, False, 0)


def test_a_replay_is_innocent_of_a_death_in_somebodys_training(tx: Connection) -> None:
    # Given
    run, other = make_run(tx), make_run(tx)
    operation = make_operation(tx, other)
    _replay(tx, run)
    _lease(tx, other)
    _start(tx, [operation])
    # When
    _die(tx, Cause.FAULT)
    # Then
    assert _suspicion(tx, run) == (None, False, 0)
    assert _now(tx, operation).suspect


def test_samples_are_innocent_of_a_death_in_a_replay_that_was_alone(tx: Connection) -> None:
    # Given
    run, sample = make_run(tx), make_sample(tx, make_sampling_session(tx))
    _replay(tx, run)
    _die(tx, Cause.FAULT)
    _replay(tx, run)
    _claim(tx)
    # When
    _die(tx, Cause.FAULT)
    # Then
    assert _suspicion(tx, run) == (None, True, 1)
    assert not _now(tx, sample).suspect


def test_a_replay_and_samples_that_took_turns_are_both_suspected(tx: Connection) -> None:
    # Given
    run, sample = make_run(tx), make_sample(tx, make_sampling_session(tx))
    _replay(tx, run)
    _claim(tx)
    # When
    _die(tx, Cause.FAULT)
    # Then
    assert _suspicion(tx, run) == (None, True, 0)
    assert _now(tx, sample).suspect


def test_a_suspect_sample_that_took_turns_with_a_replay_is_not_blamed(tx: Connection) -> None:
    # Given
    sample = make_sample(tx, make_sampling_session(tx))
    _claim(tx)
    _die(tx, Cause.FAULT)
    # When
    for _ in range(3):
        _replay(tx, make_run(tx))
        _claim(tx)
        _die(tx, Cause.FAULT)
    # Then
    assert (_now(tx, sample).suspect, _now(tx, sample).blame) == (True, 0)


def test_a_lease_that_expires_in_a_replay_makes_it_suspect_and_one_that_is_given_up_does_not(tx: Connection) -> None:
    # Given
    expired, given_up, taken_anew = make_run(tx), make_run(tx), make_run(tx)
    for run in (expired, taken_anew):
        _replay(tx, run)
    leases.release(tx, _replay(tx, given_up))
    # When
    leases.acquire(tx, expired.id, worker_id="other", now=AFTER, expires_at=AFTER + timedelta(seconds=1))
    _lease(tx, taken_anew)
    # Then
    assert _suspicion(tx, expired) == (None, True, 0)
    assert _suspicion(tx, given_up) == (None, False, 0)
    assert _suspicion(tx, taken_anew) == (None, False, 0)


def test_who_has_lost_the_lease_says_nothing_of_a_replay(tx: Connection) -> None:
    # Given
    run = make_run(tx)
    lost = _lease(tx, run)
    leases.acquire(tx, run.id, worker_id="other", now=AFTER, expires_at=AFTER + timedelta(seconds=1))
    # When
    replays.begin(tx, lost)
    # Then
    assert _suspicion(tx, run) == (None, False, 0)
