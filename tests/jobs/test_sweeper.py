"""Stalled work is announced again, and a `seq` that never arrives is closed with a stored error."""

from collections.abc import Sequence
from datetime import timedelta

import pytest

from jobs import sweeper
from jobs.settings import JobsSettings
from storage import journal, leases
from storage.clock import FrozenClock
from storage.database import Database
from storage.journal import Status
from tests.factories import make_operation, make_run, make_sample, make_sampling_session
from tests.jobs.journal_reader import Announcements

SETTINGS = JobsSettings(gap_timeout_s=600, stalled_after_s=4)


class Published(list[str]):
    """Stands in for the publisher of outcomes."""

    def publish(self, request_ids: Sequence[str]) -> None:
        """Remember."""
        self.extend(request_ids)


@pytest.fixture
def announced(database: Database) -> Announcements:
    return Announcements(database)


@pytest.fixture
def published() -> Published:
    return Published()


def _sweep(database: Database, announced: Announcements, published: Published) -> sweeper.Swept:
    return sweeper.sweep(database, announced, published, SETTINGS)  # type: ignore[arg-type]


def test_work_that_nobody_took_is_announced_again(
    database: Database, clock: FrozenClock, announced: Announcements, published: Published
) -> None:
    # Given
    with database.begin() as tx:
        run = make_run(tx)
        make_operation(tx, run, accepted_at=clock.now())
    # When
    assert _sweep(database, announced, published).runs_announced == 0
    clock.advance(5)
    # Then
    assert _sweep(database, announced, published).runs_announced == 1
    assert announced.runs == [run.id]


def test_work_of_a_held_run_is_left_to_its_holder(
    database: Database, clock: FrozenClock, announced: Announcements, published: Published
) -> None:
    # Given
    with database.begin() as tx:
        run = make_run(tx)
        make_operation(tx, run, accepted_at=clock.now())
        expires_at = clock.now() + timedelta(seconds=60)
        leases.acquire(tx, run.id, worker_id="w", now=clock.now(), expires_at=expires_at)
    # When
    clock.advance(5)
    _sweep(database, announced, published)
    # Then
    assert announced.runs == []


def test_samples_of_a_worker_that_is_gone_are_put_back_and_announced(
    database: Database, clock: FrozenClock, announced: Announcements, published: Published
) -> None:
    # Given
    with database.begin() as tx:
        sample = make_sample(tx, make_sampling_session(tx))
        expires_at = clock.now() + timedelta(seconds=10)
        journal.claim_samples(tx, worker_id="gone", limit=1, now=clock.now(), expires_at=expires_at, skip_locked=False)
    assert (_sweep(database, announced, published).claims_released, announced.samples) == (0, 0)
    # When
    clock.advance(11)
    swept = _sweep(database, announced, published)
    # Then
    assert (swept.claims_released, announced.samples) == (1, 1)
    with database.read() as tx:
        assert journal.get_operation(tx, sample.request_id).status == Status.QUEUED


def test_a_seq_that_never_arrives_is_closed_after_the_timeout_and_its_waiter_is_told(
    database: Database, clock: FrozenClock, announced: Announcements, published: Published
) -> None:
    # Given
    with database.begin() as tx:
        run = make_run(tx)
        make_operation(tx, run, 0, accepted_at=clock.now())
        make_operation(tx, run, 3, accepted_at=clock.now())
    clock.advance(599)
    assert _sweep(database, announced, published).gaps_closed == 0
    # When
    clock.advance(2)
    swept = _sweep(database, announced, published)
    # Then
    assert swept.gaps_closed == 2
    assert published == [f"{run.id}:1", f"{run.id}:2"]
    assert run.id in announced.runs
    with database.read() as tx:
        closed = journal.get_operation(tx, f"{run.id}:1")
    assert closed.status == Status.FAILED
    assert str(closed.error).startswith("seq_id 1 did not arrive within 600 s while seq_id 3 waited")


def test_a_very_wide_gap_is_closed_a_bounded_number_of_places_at_a_time(
    database: Database, clock: FrozenClock, announced: Announcements, published: Published
) -> None:
    # Given
    with database.begin() as tx:
        run = make_run(tx)
        make_operation(tx, run, 0, accepted_at=clock.now())
        make_operation(tx, run, 10**12, accepted_at=clock.now())
    clock.advance(601)
    # When
    counts = [_sweep(database, announced, published).gaps_closed for _ in range(2)]
    # Then
    assert counts == [sweeper.PLACES_PER_PASS] * 2
    with database.read() as tx:
        assert journal.first_missing(tx, run.id) == 1 + 2 * sweeper.PLACES_PER_PASS
