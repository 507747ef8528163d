"""What leases promise, on SQLite and on PostgreSQL: one holder, fenced by the epoch."""

from datetime import timedelta

import pytest
from sqlalchemy import Connection

from storage import leases, runs
from storage.database import Database
from storage.errors import LeaseLostError
from storage.leases import Lease
from tests.contracts.test_database import at_once
from tests.factories import NOW, make_run, make_session

EXPIRY = NOW + timedelta(seconds=10)


def _acquire(tx: Connection, run_id: str, worker_id: str, *, at_s: float = 0) -> Lease:
    now = NOW + timedelta(seconds=at_s)
    return leases.acquire(tx, run_id, worker_id=worker_id, now=now, expires_at=now + timedelta(seconds=10))


def test_a_free_run_is_acquired_and_nobody_else_gets_it(database: Database) -> None:
    with database.begin() as tx:
        # Given
        run = make_run(tx)
        # When
        lease = _acquire(tx, run.id, "a")
        # Then
        assert lease == Lease(run.id, "a", 1)
        with pytest.raises(LeaseLostError) as raised:
            _acquire(tx, run.id, "b", at_s=9)
        assert (raised.value.holder, raised.value.run_id) == ("a", run.id)
        assert leases.is_held(tx, lease)


def test_of_workers_that_ask_at_once_one_gets_the_lease(database: Database) -> None:
    # Given
    with database.begin() as tx:
        run = make_run(tx)

    def acquire(place: int) -> bool:
        try:
            with database.begin() as tx:
                _acquire(tx, run.id, f"w{place}")
        except LeaseLostError:
            return False
        return True

    # When
    got = at_once(acquire)
    # Then
    assert sorted(got) == [False, False, False, True]


def test_an_expired_lease_goes_to_another_under_a_later_epoch(database: Database) -> None:
    with database.begin() as tx:
        # Given
        run = make_run(tx)
        first = _acquire(tx, run.id, "a")
        # When
        second = _acquire(tx, run.id, "b", at_s=10.001)
        # Then
        assert second.epoch > first.epoch
        assert not leases.is_held(tx, first)


def test_the_holder_that_acquires_again_fences_what_it_did_before(database: Database) -> None:
    with database.begin() as tx:
        # Given
        run = make_run(tx)
        first = _acquire(tx, run.id, "a")
        # When
        second = _acquire(tx, run.id, "a")
        # Then
        assert second.epoch == first.epoch + 1
        with pytest.raises(LeaseLostError):
            leases.advance(tx, first, state_seq=0)


def test_only_the_current_epoch_advances_the_run(database: Database) -> None:
    with database.begin() as tx:
        # Given
        run = make_run(tx)
        lost = _acquire(tx, run.id, "a")
        held = _acquire(tx, run.id, "b", at_s=11)
        # When
        leases.advance(tx, held, state_seq=4)
        # Then
        with pytest.raises(LeaseLostError) as raised:
            leases.advance(tx, lost, state_seq=7)
        assert raised.value.holder == "b"
        with pytest.raises(LeaseLostError):
            leases.committed_seq(tx, lost)
        assert leases.committed_seq(tx, held) == runs.get_run(tx, run.id).state_seq == 4


def test_an_expired_lease_that_nobody_took_still_advances(database: Database) -> None:
    """Expiry says when another may try; safety rests on the epoch alone."""
    with database.begin() as tx:
        # Given
        run = make_run(tx)
        lease = _acquire(tx, run.id, "a")
        assert leases.find_holder(tx, run.id, now=EXPIRY + timedelta(seconds=1)) is None
        # When
        leases.advance(tx, lease, state_seq=0)
        # Then
        assert leases.committed_seq(tx, lease) == 0


def test_a_renewed_lease_lasts_longer_and_a_lost_one_is_told(database: Database) -> None:
    with database.begin() as tx:
        # Given
        session = make_session(tx)
        kept, lost = (make_run(tx, session=session, model_seq_id=place) for place in (0, 1))
        held = [_acquire(tx, lost.id, "a"), _acquire(tx, kept.id, "a")]
        _acquire(tx, lost.id, "b", at_s=11)
        # When
        still = leases.renew(tx, held, expires_at=NOW + timedelta(seconds=30))
        # Then
        assert list(still) == [kept.id]
        assert leases.find_holder(tx, kept.id, now=NOW + timedelta(seconds=29)) == "a"
        assert leases.find_holder(tx, lost.id, now=NOW + timedelta(seconds=12)) == "b"


def test_a_released_lease_is_free_at_once_and_releasing_a_lost_one_changes_nothing(database: Database) -> None:
    with database.begin() as tx:
        # Given
        run = make_run(tx)
        first = _acquire(tx, run.id, "a")
        # When
        leases.release(tx, first)
        second = _acquire(tx, run.id, "b")
        leases.release(tx, first)
        # Then
        assert leases.is_held(tx, second)
        assert leases.find_holder(tx, run.id, now=NOW) == "b"


def test_a_dead_workers_leases_are_freed_and_fenced(database: Database) -> None:
    with database.begin() as tx:
        # Given
        session = make_session(tx)
        first, second, other = (make_run(tx, session=session, model_seq_id=place) for place in range(3))
        lease = _acquire(tx, first.id, "dead")
        _acquire(tx, second.id, "dead")
        kept = _acquire(tx, other.id, "alive")
        # When
        freed = leases.release_worker(tx, "dead")
        # Then
        assert sorted(freed) == sorted([first.id, second.id])
        assert leases.is_held(tx, kept)
        with pytest.raises(LeaseLostError):
            leases.advance(tx, lease, state_seq=0)
        assert _acquire(tx, first.id, "alive").epoch == lease.epoch + 2
        assert leases.release_worker(tx, "dead") == []


def test_a_commit_waits_for_a_takeover_in_progress_and_then_fails(database: Database) -> None:
    # Given
    with database.begin() as tx:
        run = make_run(tx)
        lost = _acquire(tx, run.id, "a")

    def act(place: int) -> str:
        try:
            with database.begin() as tx:
                if place == 0:
                    _acquire(tx, run.id, "b", at_s=11)
                    return "taken"
                leases.committed_seq(tx, lost)
                leases.advance(tx, lost, state_seq=0)
        except LeaseLostError:
            return "lost"
        return "committed"

    # When
    results = at_once(act, 2)
    # Then either the commit came first, or it was refused; never both states mixed
    with database.read() as tx:
        state_seq = runs.get_run(tx, run.id).state_seq
        assert leases.find_holder(tx, run.id, now=NOW + timedelta(seconds=11)) == "b"
    assert results[0] == "taken"
    assert (results[1], state_seq) in {("committed", 0), ("lost", -1)}
