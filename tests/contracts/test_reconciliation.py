"""Billed and overhead held against busy: what is lost or billed twice is seen."""

import pytest
import sqlalchemy
import structlog

from billing import reconciliation
from billing.reconciliation import reconcile
from storage import billing_tables, workers
from storage.database import Database
from storage.workers import Work
from tests.factories import NOW, bill, make_operation, make_run, make_usage

SECOND = 10**9


def make_worker(database: Database, worker_id: str, *, busy_ns: int, overhead_ns: int, under_way_ns: int = 0) -> None:
    with database.begin() as tx:
        workers.register(tx, worker_id=worker_id, host="h", pid=1, device="cpu", now=NOW)
        work = Work(busy_ns=busy_ns, overhead_ns=overhead_ns)
        workers.add_work(tx, worker_id, work, number=1, under_way_ns=under_way_ns, tail_p95_ns=0)


def make_bill(database: Database, worker_id: str, device_ns: int, *, num_rolled_up: int = 0) -> None:
    with database.begin() as tx:
        run = make_run(tx)
        for seq in range(2):
            used = make_usage(device_ns=device_ns // 2, worker_id=worker_id)
            bill(tx, run, make_operation(tx, run, seq), used)
        if num_rolled_up:
            usage, worker = billing_tables.usage_record, workers._table
            tx.execute(sqlalchemy.update(usage).where(usage.c.id <= num_rolled_up).values(rolled_up=True))
            tx.execute(sqlalchemy.update(worker).values(rolled_up_ns=num_rolled_up * device_ns // 2))


@pytest.mark.parametrize("num_rolled_up", [0, 1, 2])
def test_what_adds_up_has_no_drift_whatever_is_rolled_up(database: Database, num_rolled_up: int) -> None:
    # Given
    make_worker(database, "w", busy_ns=10 * SECOND, overhead_ns=SECOND, under_way_ns=3 * SECOND)
    make_bill(database, "w", 6 * SECOND, num_rolled_up=num_rolled_up)
    # When
    with database.read() as tx:
        found = reconcile(tx)
    # Then
    assert [(balance.worker_id, balance.billed_ns, balance.drift_ns) for balance in found.balances] == [
        ("w", 6 * SECOND, 0)
    ]
    assert (found.drift_ppm, found.alarm) == (0, False)


@pytest.mark.parametrize(
    ("overhead_ns", "alarm"), [(2 * SECOND, False), (2 * SECOND + 10**7, False), (2 * SECOND + 2 * 10**7, True)]
)
def test_more_than_a_thousandth_is_an_alarm(database: Database, overhead_ns: int, alarm: bool) -> None:
    # Given: two workers, one of which is off by 0, 0.1 and 0.2 %
    make_worker(database, "good", busy_ns=100 * SECOND, overhead_ns=100 * SECOND)
    make_worker(database, "w", busy_ns=10 * SECOND, overhead_ns=overhead_ns)
    make_bill(database, "w", 8 * SECOND)
    # When
    with database.begin() as tx:
        found = reconcile(tx)
        reconciliation.record(tx, reconciliation.unrecorded(tx), now=NOW)
        row = tx.execute(sqlalchemy.select(billing_tables.reconciliation)).one()
    # Then
    assert found.alarm is alarm
    assert (row.alarm, row.drift_ppm, row.num_workers) == (alarm, found.drift_ppm, 2)


def test_workers_that_were_hardly_busy_are_judged_together(database: Database) -> None:
    # Given: ten workers each off by 1 %, in either direction
    for number in range(10):
        make_worker(
            database, f"w{number}", busy_ns=SECOND // 5, overhead_ns=SECOND // 5 + (-1) ** number * SECOND // 500
        )
    # When
    with database.read() as tx:
        found = reconcile(tx)
    # Then
    assert [(balance.busy_ns, balance.drift_ns) for balance in found.balances] == [(2 * SECOND, 0)]


def test_a_fault_is_seen_within_the_hour_and_told_once_however_long_all_was_well(database: Database) -> None:
    # Given: a worker that was busy for a million seconds without a fault, and one that was not
    make_worker(database, "w", busy_ns=10**6 * SECOND, overhead_ns=10**6 * SECOND)
    make_worker(database, "short", busy_ns=SECOND // 2, overhead_ns=SECOND // 2)
    recorded = [record(database)]
    # When: a hundred seconds later one of them is missing
    add_work(database, "w", busy_ns=100 * SECOND, overhead_ns=99 * SECOND, number=2)
    with database.read() as tx:
        assert not reconcile(tx).alarm
    recorded.append(record(database))
    # And then all is well again, or nothing is done
    add_work(database, "w", busy_ns=100 * SECOND, overhead_ns=100 * SECOND, number=3)
    recorded += [record(database), record(database)]
    # Then
    assert recorded == [(1, 0, False), (1, 10_000, True), (1, 0, False), (0, 0, False)]
    with database.read() as tx:
        assert [(alarm.worker_id, alarm.drift_ppm) for alarm in reconciliation.alarms(tx)] == [("w", 10_000)]


def test_every_worker_that_is_off_is_named(database: Database) -> None:
    # given
    make_worker(database, "good", busy_ns=10 * SECOND, overhead_ns=10 * SECOND)
    make_worker(database, "v", busy_ns=10 * SECOND, overhead_ns=9 * SECOND)
    make_worker(database, "w", busy_ns=10 * SECOND, overhead_ns=8 * SECOND)
    make_worker(database, "short", busy_ns=SECOND // 2, overhead_ns=0)
    make_worker(database, "shorter", busy_ns=SECOND // 2, overhead_ns=SECOND // 4)
    stop(database, "short", "shorter")
    # when
    with structlog.testing.capture_logs() as logs:
        assert record(database) == (5, 750_000, True)
    # then
    off = {"v": 100_000, "w": 200_000, None: 750_000}
    assert {one["worker"]: one["ppm"] for one in logs} == {id_ or reconciliation.TOGETHER: off[id_] for id_ in off}
    with database.read() as tx:
        assert {alarm.worker_id: alarm.drift_ppm for alarm in reconciliation.alarms(tx)} == off


def test_what_is_billed_without_a_clock_that_runs_is_an_alarm(database: Database) -> None:
    # given
    make_worker(database, "good", busy_ns=10 * SECOND, overhead_ns=10 * SECOND)
    make_worker(database, "w", busy_ns=0, overhead_ns=3 * SECOND)
    # when, then
    assert record(database) == (2, 10**6, True)
    # and what was under way and is in neither of the others
    make_worker(database, "v", busy_ns=9 * SECOND, overhead_ns=0, under_way_ns=9 * SECOND)
    assert record(database) == (1, 0, False)
    add_work(database, "v", busy_ns=0, overhead_ns=0, number=2)
    assert record(database) == (1, 10**6, True)


def test_what_ends_is_not_held_against_the_little_that_began(database: Database) -> None:
    # given ten minutes of work that is under way
    make_worker(database, "w", busy_ns=600 * SECOND, overhead_ns=0, under_way_ns=600 * SECOND)
    record(database)
    # when it has ended, two milliseconds short
    add_work(database, "w", busy_ns=SECOND, overhead_ns=601 * SECOND - SECOND // 500, number=2)
    # then
    assert record(database) == (1, 4, False)


def test_what_another_has_recorded_meanwhile_is_not_recorded_twice(database: Database) -> None:
    # given two that have read at the same time
    make_worker(database, "w", busy_ns=10 * SECOND, overhead_ns=9 * SECOND)
    with database.read() as tx:
        one, other = reconciliation.unrecorded(tx), reconciliation.unrecorded(tx)
    # when
    kept = []
    for found in (one, other):
        with database.begin() as tx:
            kept.append(reconciliation.record(tx, found, now=NOW))
    # then
    assert kept == [True, False]
    with database.read() as tx:
        assert len(reconciliation.alarms(tx)) == 1


def test_what_was_done_shortly_is_kept_until_there_is_enough_to_tell(database: Database) -> None:
    # Given: workers that stop after half a second, and have lost a hundredth of it
    for number in range(3):
        make_worker(database, f"w{number}", busy_ns=SECOND // 2, overhead_ns=SECOND // 2 - SECOND // 200)
        stop(database, f"w{number}")
        # When, Then: two of them are enough, and the third waits for others
        assert record(database) == ((2, 10_000, True) if number == 1 else (0, 0, False))
    make_worker(database, "w3", busy_ns=SECOND // 2, overhead_ns=SECOND // 2)
    stop(database, "w3")
    assert record(database) == (2, 5_000, True)
    with database.read() as tx:
        rows = tx.execute(sqlalchemy.select(billing_tables.reconciliation)).all()
        busy_ns = sum(balance.busy_ns for balance in reconcile(tx).balances)
    assert sum(row.busy_ns for row in rows) == busy_ns, "every second is in one record"


def test_a_worker_that_does_little_is_not_hidden_by_others_that_do(database: Database) -> None:
    # given ten workers, one of which loses a hundredth
    names = [f"w{number}" for number in range(10)]
    for name in names:
        make_worker(database, name, busy_ns=0, overhead_ns=0)
    # when each does little between two records
    recorded = []
    for number in range(2, 5):
        for name in names:
            lost = SECOND // 250 if name == "w0" else 0
            add_work(database, name, busy_ns=2 * SECOND // 5, overhead_ns=2 * SECOND // 5 - lost, number=number)
        recorded.append(record(database))
    # then it is judged by itself, once there is enough
    assert recorded == [(0, 0, False), (0, 0, False), (10, 10_000, True)]
    with database.read() as tx:
        assert [alarm.worker_id for alarm in reconciliation.alarms(tx)] == ["w0"]


def test_what_is_under_way_is_no_drift_in_any_record(database: Database) -> None:
    # Given: a step that is under way
    make_worker(database, "w", busy_ns=10 * SECOND, overhead_ns=2 * SECOND, under_way_ns=8 * SECOND)
    first = record(database)
    # When: it is done
    add_work(database, "w", busy_ns=4 * SECOND, overhead_ns=12 * SECOND, number=2)
    # Then
    assert [first, record(database)] == [(1, 0, False), (1, 0, False)]


def add_work(database: Database, worker_id: str, *, busy_ns: int, overhead_ns: int, number: int) -> None:
    with database.begin() as tx:
        work = Work(busy_ns=busy_ns, overhead_ns=overhead_ns)
        workers.add_work(tx, worker_id, work, number=number, under_way_ns=0, tail_p95_ns=0)


def stop(database: Database, *worker_ids: str) -> None:
    with database.begin() as tx:
        for worker_id in worker_ids:
            workers.record_stopped(tx, worker_id, ended_by="itself", now=NOW)


def record(database: Database) -> tuple[int, int, bool]:
    """Number of workers, drift in millionths, alarm."""
    with database.begin() as tx:
        reconciliation.record(tx, reconciliation.unrecorded(tx), now=NOW)
        row = tx.execute(sqlalchemy.select(billing_tables.reconciliation).order_by(sqlalchemy.desc("id"))).first()
    assert row is not None
    return row.num_workers, row.drift_ppm, row.alarm
