"""A run whose client is gone is executed to its end, written back and let go of; the next operation wakes it."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
from sqlalchemy import update

from jobs.operations import OptimStep, OptimStepOutcome
from storage import runs, snapshots, tables
from storage.runs import Run
from tests.worker.harness import WAIT_S, Engine, Service

FOR_EVER_S = 1e6
GONE = timedelta(hours=1)


@pytest.fixture
def warm(service: Service) -> Engine:
    """A worker that keeps idle runs for ever."""
    return Engine(service, "warm", warm_s=FOR_EVER_S).start()


def leave(service: Service, run: Run) -> None:
    """The client was last heard of an hour ago."""
    with service.storage.database.begin() as tx:
        long_ago = service.storage.database.now(tx) - GONE
        tx.execute(update(tables.session).where(tables.session.c.id == run.session_id).values(heartbeat_at=long_ago))
        tx.execute(update(tables.run).where(tables.run.c.id == run.id).values(last_request_at=long_ago))


def holder(service: Service, run: Run) -> str | None:
    with service.storage.database.read() as tx:
        return runs.get_run(tx, run.id).lease_worker


def wait_until_parked(service: Service, run: Run) -> None:
    deadline = time.monotonic() + WAIT_S
    while holder(service, run) is not None:
        assert time.monotonic() < deadline, "the run is not parked"
        time.sleep(0.005)


def test_a_run_whose_client_is_gone_is_written_back_and_woken_by_its_next_operation(
    service: Service, warm: Engine
) -> None:
    # given: work was left behind
    run = service.create_run()
    left = [service.submit(run, seq, OptimStep()) for seq in (1, 2)]
    leave(service, run)
    warm.take(run)
    warm.loop.renew()
    # then: it is done, and the state is in the object store
    assert all(isinstance(service.outcome(request_id), OptimStepOutcome) for request_id in left)
    warm.loop.renew()
    wait_until_parked(service, run)
    with service.storage.database.read() as tx:
        assert snapshots.newest_seq(tx, run.id) == 2
    assert warm.loop.roster.active() == []
    # when: somebody comes back
    woken = service.submit(run, 3, OptimStep())
    warm.take(run)
    # then
    assert isinstance(service.outcome(woken), OptimStepOutcome)
    warm.leave()


def test_a_run_whose_client_is_there_is_kept_warm(service: Service, warm: Engine) -> None:
    # given: two runs that are idle, of which the client of one is gone
    stays, goes = service.create_run(), service.create_run()
    for run in (stays, goes):
        warm.take(run)
        service.outcome(f"{run.id}:0")
    with service.storage.database.begin() as tx:
        other = runs.create_session(
            tx,
            account_id=goes.account_id,
            api_key_id=None,
            now=service.storage.database.now(tx),
            sdk_version="tests",
        )
        tx.execute(update(tables.run).where(tables.run.c.id == goes.id).values(session_id=other.id))
        now = service.storage.database.now(tx)
        runs.finish_session(tx, other.account_id, other.id, reason="success", detail=None, now=now)
    # when
    warm.loop.renew()
    wait_until_parked(service, goes)
    # then
    assert holder(service, stays) == "warm"
    warm.leave()


def test_requests_without_heartbeats_are_a_sign_of_life(service: Service) -> None:
    # given: a client that sends no heartbeats, but has just submitted
    run = service.create_run()
    leave(service, run)
    service.submit(run, 1, OptimStep())
    with service.storage.database.read() as tx:
        since = service.storage.database.now(tx) - timedelta(minutes=1)
        assert runs.without_client(tx, [run.id], silent_since=since) == set()
