"""What a worker tells of its work holds whatever the database says of the transaction that told it."""

from __future__ import annotations

import dataclasses
from datetime import timedelta

import pytest
from sqlalchemy import func, select

from jobs.operations import Failure, OptimStepOutcome
from storage import billing_tables, journal, leases, retry, workers
from storage.clock import FrozenClock
from storage.journal import Operation
from storage.open import Storage
from storage.runs import Run
from storage.workers import Worker
from tests.factories import NOW, make_operation, make_run, make_usage
from tests.worker.test_commit import AnswersLost
from worker.commit import Committer, Done, RunCommit
from worker.work_meter import WorkMeter

STEP_NS = 1000
"""What `make_usage` says of an operation."""


class CountingClock:
    """Is as busy as it is told."""

    busy_ns = 0


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying again does not wait."""
    monkeypatch.setattr(retry, "RETRY_FIRST_S", 0.0)


@pytest.fixture
def clock_around() -> CountingClock:
    return CountingClock()


@pytest.fixture
def meter(storage: Storage, clock_around: CountingClock) -> WorkMeter:
    with storage.database.begin() as tx:
        workers.register(tx, worker_id="w", host="h", pid=1, device="cpu", now=NOW)
    return WorkMeter("w", clock_around)  # type: ignore[arg-type]


def row(storage: Storage) -> Worker:
    with storage.database.read() as tx:
        worker = workers.find_worker(tx, "w")
    assert worker is not None
    return worker


def billed_ns(storage: Storage) -> int:
    with storage.database.read() as tx:
        return int(tx.execute(select(func.sum(billing_tables.usage_record.c.device_ns))).scalar_one() or 0)


def adds_up(storage: Storage) -> bool:
    worker = row(storage)
    return worker.busy_ns == billed_ns(storage) + worker.overhead_ns + worker.under_way_ns


def held_run(storage: Storage, clock: FrozenClock) -> tuple[Run, leases.Lease, list[Operation]]:
    with storage.database.begin() as tx:
        run = make_run(tx)
        operations = [make_operation(tx, run, seq, "optim_step") for seq in range(3)]
        expires_at = clock.now() + timedelta(seconds=10)
        lease = leases.acquire(tx, run.id, worker_id="w", now=clock.now(), expires_at=expires_at)
    return run, lease, operations


def tell(storage: Storage, meter: WorkMeter) -> None:
    with storage.database.begin() as tx:
        meter.write(tx)
    meter.told()


@pytest.mark.parametrize("answers", [[], ["after"], ["before"], ["before", "after"], ["after", "before"]])
def test_a_commit_of_unknown_outcome_counts_its_work_once(
    storage: Storage, clock: FrozenClock, meter: WorkMeter, clock_around: CountingClock, answers: list[str]
) -> None:
    # given a turn of three operations, the second of which failed
    run, lease, operations = held_run(storage, clock)
    outcomes = [OptimStepOutcome({}), Failure("change this"), OptimStepOutcome({})]
    done = [Done(operation, outcome, make_usage()) for operation, outcome in zip(operations, outcomes, strict=True)]
    clock_around.busy_ns += 3 * STEP_NS
    unsure = dataclasses.replace(storage, database=AnswersLost(storage, list(answers)))  # type: ignore[arg-type]
    # when the database does not say whether it took effect
    Committer(unsure, meter, worker_id="w", publish=lambda _: None).commit_runs([RunCommit(run, lease, done)])
    # then everything is counted once
    assert (row(storage).busy_ns, billed_ns(storage), row(storage).overhead_ns) == (3000, 2000, 1000)
    assert adds_up(storage)
    assert not meter.has_news


def test_what_was_lost_to_another_worker_is_overhead(
    storage: Storage, clock: FrozenClock, meter: WorkMeter, clock_around: CountingClock
) -> None:
    # given a turn whose run was taken over meanwhile
    run, lease, operations = held_run(storage, clock)
    with storage.database.begin() as tx:
        later = clock.now() + timedelta(seconds=11)
        leases.acquire(tx, run.id, worker_id="other", now=later, expires_at=later)
    clock_around.busy_ns += STEP_NS
    # when it is committed
    done = [Done(operations[0], OptimStepOutcome({}), make_usage())]
    Committer(storage, meter, worker_id="w", publish=lambda _: None).commit_runs([RunCommit(run, lease, done)])
    # then nobody is billed
    assert (row(storage).busy_ns, billed_ns(storage), row(storage).overhead_ns) == (1000, 0, 1000)
    with storage.database.read() as tx:
        assert journal.get_operation(tx, operations[0].request_id).status == journal.Status.QUEUED


@pytest.mark.parametrize("took_effect", [True, False])
def test_a_report_in_doubt_is_told_once(
    storage: Storage, meter: WorkMeter, clock_around: CountingClock, took_effect: bool
) -> None:
    # given a report of which nobody knows whether it is in the database
    clock_around.busy_ns = 100
    meter.waste(100)
    with storage.database.engine.connect() as tx:
        meter.write(tx)
        tx.commit() if took_effect else tx.rollback()
    meter.doubt()
    assert meter.has_news
    # when more is done, and told
    clock_around.busy_ns = 150
    meter.waste(50)
    tell(storage, meter)
    # then both are there, once
    assert (row(storage).busy_ns, row(storage).overhead_ns) == (150, 150)
    assert not meter.has_news


def test_what_is_under_way_when_a_worker_dies_was_in_vain(
    storage: Storage, meter: WorkMeter, clock_around: CountingClock
) -> None:
    # given samples that have used device time and are not done
    clock_around.busy_ns = 70
    meter.under_way_ns = lambda: 70
    tell(storage, meter)
    assert (row(storage).under_way_ns, row(storage).overhead_ns) == (70, 0)
    # when the worker dies
    with storage.database.begin() as tx:
        workers.record_stopped(tx, "w", ended_by="fault", now=NOW)
    # then it is overhead
    assert (row(storage).under_way_ns, row(storage).overhead_ns) == (0, 70)
    assert adds_up(storage)
