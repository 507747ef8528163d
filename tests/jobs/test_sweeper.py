"""Stalled work is announced again, and a `seq` that never arrives is closed with a stored error."""

from datetime import timedelta

import pytest
from sqlalchemy import Connection

from jobs import sweeper
from jobs.reminders import Reminders
from jobs.settings import JobsSettings
from storage import claims, journal, leases
from storage.clock import FrozenClock
from storage.database import Database
from storage.journal import Status
from storage.runs import Run
from tests.factories import complete, make_operation, make_run, make_sample, make_sampling_session
from tests.jobs.journal_reader import CheckedAnnouncements

SETTINGS = JobsSettings(gap_timeout_s=600, stalled_after_s=4)


@pytest.fixture
def announced(database: Database) -> CheckedAnnouncements:
    return CheckedAnnouncements(database=database)


@pytest.fixture
def published() -> list[str]:
    return []


def _reminders() -> Reminders:
    return Reminders(first_s=2, longest_s=60)


def _sweep(
    database: Database, announced: CheckedAnnouncements, published: list[str], reminders: Reminders | None = None
) -> sweeper.Swept:
    reminders = reminders or _reminders()
    return sweeper.sweep(database, announced, published.extend, SETTINGS, reminders)


def test_work_that_nobody_took_is_announced_again(
    database: Database, clock: FrozenClock, announced: CheckedAnnouncements, published: list[str]
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


def test_work_that_its_runs_holder_has_begun_is_left_to_it(
    database: Database, clock: FrozenClock, announced: CheckedAnnouncements, published: list[str]
) -> None:
    # Given
    reminders = _reminders()
    with database.begin() as tx:
        run = make_run(tx)
        operation = make_operation(tx, run, accepted_at=clock.now())
        _hold(tx, run, clock)
        journal.start(tx, [operation.id], worker_id="w", now=clock.now())
    # When
    for _ in range(3):
        clock.advance(5)
        _sweep(database, announced, published, reminders)
    # Then
    assert announced.runs == []


def _hold(tx: Connection, run: Run, clock: FrozenClock, *, lease_s: float = 60) -> leases.Lease:
    expires_at = clock.now() + timedelta(seconds=lease_s)
    return leases.acquire(tx, run.id, worker_id="w", now=clock.now(), expires_at=expires_at)


def test_work_that_its_runs_holder_knows_nothing_of_is_announced_by_the_second_pass(
    database: Database, clock: FrozenClock, announced: CheckedAnnouncements, published: list[str]
) -> None:
    # Given
    reminders = _reminders()
    with database.begin() as tx:
        run = make_run(tx)
        make_operation(tx, run, accepted_at=clock.now())
        _hold(tx, run, clock)
    clock.advance(5)
    _sweep(database, announced, published, reminders)
    assert announced.runs == []
    # When
    clock.advance(2)
    _sweep(database, announced, published, reminders)
    # Then
    assert announced.runs == [run.id]


def test_a_long_queue_of_a_run_that_moves_on_is_not_announced(
    database: Database, clock: FrozenClock, announced: CheckedAnnouncements, published: list[str]
) -> None:
    # Given
    reminders = _reminders()
    with database.begin() as tx:
        run = make_run(tx)
        operations = [make_operation(tx, run, seq, accepted_at=clock.now()) for seq in range(5)]
        lease = _hold(tx, run, clock)
    clock.advance(5)
    # When
    for seq, operation in enumerate(operations[:4]):
        with database.begin() as tx:
            complete(tx, operation)
            leases.advance(tx, lease, state_seq=seq)
        _sweep(database, announced, published, reminders)
        clock.advance(2)
    # Then
    assert announced.runs == []


def test_without_workers_work_is_announced_at_growing_intervals(
    database: Database, clock: FrozenClock, announced: CheckedAnnouncements, published: list[str]
) -> None:
    # Given
    reminders = _reminders()
    with database.begin() as tx:
        make_operation(tx, make_run(tx), accepted_at=clock.now())
        make_sample(tx, make_sampling_session(tx))
    # When
    runs_at, samples_at = list[int](), list[int]()
    for second in range(0, 301, 2):
        before = announced.samples
        if _sweep(database, announced, published, reminders).runs_announced:
            runs_at.append(second)
        if announced.samples > before:
            samples_at.append(second)
        clock.advance(2)
    # Then
    assert samples_at == [0, 2, 6, 14, 30, 62, 122, 182, 242]
    assert runs_at == [6 + second for second in samples_at]


def test_work_of_a_dead_worker_is_announced_at_once_however_long_it_had_waited(
    database: Database, clock: FrozenClock, announced: CheckedAnnouncements, published: list[str]
) -> None:
    # Given
    reminders = _reminders()
    with database.begin() as tx:
        run = make_run(tx)
        operation = make_operation(tx, run, accepted_at=clock.now())
    for _ in range(100):
        clock.advance(2)
        _sweep(database, announced, published, reminders)
    # When
    with database.begin() as tx:
        _hold(tx, run, clock, lease_s=3)
        journal.start(tx, [operation.id], worker_id="w", now=clock.now())
    announced.runs.clear()
    _sweep(database, announced, published, reminders)
    assert announced.runs == []
    clock.advance(4)
    _sweep(database, announced, published, reminders)
    # Then
    assert announced.runs == [run.id]


def test_a_lease_that_expires_between_two_passes_is_news(
    database: Database, clock: FrozenClock, announced: CheckedAnnouncements, published: list[str]
) -> None:
    # Given
    reminders = _reminders()
    with database.begin() as tx:
        run = make_run(tx)
        make_operation(tx, run, accepted_at=clock.now())
        _hold(tx, run, clock, lease_s=41)
    for _ in range(20):
        clock.advance(2)
        _sweep(database, announced, published, reminders)
    announced.runs.clear()
    # When
    clock.advance(2)
    _sweep(database, announced, published, reminders)
    # Then
    assert announced.runs == [run.id]


def test_samples_of_a_worker_that_is_gone_are_put_back_and_announced(
    database: Database, clock: FrozenClock, announced: CheckedAnnouncements, published: list[str]
) -> None:
    # Given
    with database.begin() as tx:
        sample = make_sample(tx, make_sampling_session(tx))
        expires_at = clock.now() + timedelta(seconds=10)
        claims.claim_samples(tx, worker_id="gone", limit=1, now=clock.now(), expires_at=expires_at, skip_locked=False)
    assert (_sweep(database, announced, published).claims_released, announced.samples) == (0, 0)
    # When
    clock.advance(11)
    swept = _sweep(database, announced, published)
    # Then
    assert (swept.claims_released, announced.samples) == (1, 1)
    with database.read() as tx:
        assert journal.get_operation(tx, sample.request_id).status == Status.QUEUED


def test_a_seq_that_never_arrives_is_closed_after_the_timeout_and_its_waiter_is_told(
    database: Database, clock: FrozenClock, announced: CheckedAnnouncements, published: list[str]
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
    database: Database, clock: FrozenClock, announced: CheckedAnnouncements, published: list[str]
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
