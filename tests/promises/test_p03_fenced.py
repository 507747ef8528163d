"""P3: two workers never both advance a run or complete a sample; the loser's work is discarded whole, its usage too.

What is stopped here is stopped on PostgreSQL: a process that stands still within a transaction keeps SQLite's lock.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import select

from storage import leases, tables
from storage.failpoints import Point
from tests.promises.conftest import Connect
from tests.promises.kit import PROGRAM, PatientWire, billed, wait_until
from tests.setups.deployment import Deployment

pytestmark = pytest.mark.processes

Undisturbed = tuple[list[Any], list[list[tuple[Any, ...]]]]


@pytest.fixture(scope="module")
def another_worker(deployed: Deployment) -> Iterator[None]:
    """One more worker, which takes over what the other loses."""
    deployed.start_worker("another")
    wait_until(lambda: bool(deployed.events("worker_ready", worker="another")), "ready", deployed)
    yield
    deployed.end_child("another")


@pytest.fixture
def zombies(deployed: Deployment) -> Iterator[list[int]]:
    """Pids of processes that a test has stopped; they wake up at its end at the latest."""
    stopped: list[int] = []
    yield stopped
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    deployed.disarm()


@pytest.mark.servers
@pytest.mark.usefixtures("another_worker")
@pytest.mark.parametrize("point", [Point.TURN_COMPUTED, Point.COMMIT_WRITTEN])
def test_a_worker_that_wakes_up_after_its_lease_went_changes_nothing(
    deployed: Deployment, connect: Connect, undisturbed: Undisturbed, zombies: list[int], point: Point
) -> None:
    # given a worker that is stopped after it has computed operations: before, or in the middle of, its commit
    wire = connect(deployed)
    run = wire.run()
    deployed.arm(point, "stop")
    request_ids = [wire.submit_seq(run, seq) for seq in PROGRAM[:6]]
    zombies.append(deployed.fired(point))
    sleeper = _worker_of(deployed, zombies[0])

    # when its lease expires, another worker takes over and goes on, and the first wakes up in between
    results = [wire.result(request_id) for request_id in request_ids]
    os.kill(zombies[0], signal.SIGCONT)
    results += wire.run_program(run, PROGRAM[6:])
    wait_until(lambda: bool(deployed.events("commit_discarded", run=run)), "discarded", deployed)

    # then nothing of the first one's turn was written, neither results nor usage
    operations = billed(deployed, run=run)[1:]
    assert results == undisturbed[0]
    assert [operation.amounts for operation in operations] == undisturbed[1]
    assert operations[0].usage[0][-2:] != (1, sleeper)


@pytest.mark.servers
@pytest.mark.usefixtures("another_worker")
@pytest.mark.parametrize("point", [Point.SAMPLES_DRAWN, Point.SAMPLE_COMMIT_WRITTEN])
def test_a_worker_that_wakes_up_after_its_claim_went_completes_no_sample(
    deployed: Deployment, connect: Connect, zombies: list[int], point: Point
) -> None:
    # given what a sample is, and a worker that is stopped after it has drawn the same again
    wire = connect(deployed)
    expected = wire.result(wire.sample(wire.sampler(0)))
    deployed.arm(point, "stop")
    request_id = wire.sample(wire.sampler(1))
    zombies.append(deployed.fired(point))
    sleeper = _worker_of(deployed, zombies[0])

    # when its claim expires, another worker draws it, and the first wakes up
    result = wire.result(request_id)
    os.kill(zombies[0], signal.SIGCONT)
    wait_until(lambda: bool(deployed.events("sample_discarded", request=request_id)), "discarded", deployed)

    # then the sample is the same, and billed once: to the one who completed it
    (operation,) = billed(deployed, request_id=request_id)
    assert result["sequences"] == expected["sequences"]
    assert [record[-2] for record in operation.usage] == [2]
    assert operation.usage[0][-1] != sleeper


def test_of_a_packed_batch_only_the_run_whose_lease_went_is_discarded(
    service: Deployment, wire: PatientWire, undisturbed: Undisturbed
) -> None:
    # given two runs in one turn of a worker, which is held up before it commits
    busy, lost, kept = (wire.run(number) for number in range(3))
    service.arm(Point.TURN_COMPUTED, "pause 2")
    wire.submit_seq(busy, 1)
    service.fired(Point.TURN_COMPUTED)
    service.arm(Point.TURN_COMPUTED, "pause 2")
    request_ids = [wire.submit_seq(run, 1) for run in (lost, kept)]
    service.fired(Point.TURN_COMPUTED)

    # when another takes one of them meanwhile, and gives it back
    with service.storage() as storage, storage.database.begin() as tx:
        expired = storage.database.after(tx, 3600)
        lease = leases.acquire(tx, lost, worker_id="a-third", now=expired, expires_at=expired)
        leases.release(tx, lease)

    # then that one is computed again, the other one was committed; both have one result and one usage record
    assert [wire.result(request_id) for request_id in request_ids] == undisturbed[0][:1] * 2
    operations = [billed(service, run=run)[1] for run in (lost, kept)]
    assert [operation.attempts for operation in operations] == [2, 1]
    assert [operation.amounts for operation in operations] == undisturbed[1][:1] * 2


@pytest.mark.parametrize(("point", "attempts"), [(Point.COMMIT_WRITTEN, 2), (Point.COMMITTED, 1)])
def test_a_commit_that_its_worker_did_not_survive_counts_wholly_or_not_at_all(
    service: Deployment, wire: PatientWire, undisturbed: Undisturbed, point: Point, attempts: int
) -> None:
    # given a worker that dies just before, or just after, the database has committed
    run = wire.run()
    service.arm(point)
    request_ids = [wire.submit_seq(run, seq) for seq in (1, 2)]
    service.fired(point)

    # when another worker goes on
    results = [wire.result(request_id) for request_id in request_ids]

    # then the turn was done again, or was not: by what the database says
    operations = billed(service, run=run)[1:]
    assert results == undisturbed[0][:2]
    assert operations[0].attempts == attempts
    assert [operation.amounts for operation in operations] == undisturbed[1][:2]


@pytest.mark.parametrize(("point", "attempts"), [(Point.SAMPLE_COMMIT_WRITTEN, 2), (Point.SAMPLES_COMMITTED, 1)])
def test_a_samples_commit_that_its_worker_did_not_survive_counts_wholly_or_not_at_all(
    service: Deployment, wire: PatientWire, point: Point, attempts: int
) -> None:
    # given what a sample is, and a worker that dies just before, or just after, the database has committed it
    expected = wire.result(wire.sample(wire.sampler(0)))
    service.arm(point)
    request_id = wire.sample(wire.sampler(1))
    service.fired(point)

    # then it was drawn again, or was not, and is the same, billed once
    assert wire.result(request_id)["sequences"] == expected["sequences"]
    (operation,) = billed(service, request_id=request_id)
    assert (operation.attempts, len(operation.usage)) == (attempts, 1)


def _worker_of(service: Deployment, pid: int) -> str:
    """The id of the worker that runs as a process."""
    worker = tables.worker.c
    newest = select(worker.id).where(worker.pid == pid).order_by(worker.started_at.desc()).limit(1)
    with service.storage() as storage, storage.database.read() as tx:
        return str(tx.execute(newest).scalar_one())
