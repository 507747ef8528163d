"""A run is this worker's from the moment its lease is taken until the lease is given up."""

from __future__ import annotations

import threading

from storage.leases import Lease
from tests.worker.harness import Engine, Service
from worker import takeover
from worker.roster import FAILURES_MAX, Roster


def test_an_expected_run_is_renewed_and_not_taken_over_twice(service: Service) -> None:
    # given a run whose lease has been taken and which is still being fetched
    roster = Roster(lambda: None)
    run = service.create_run()
    fresh, lease = takeover.acquire(service.storage, run.id, worker_id="w", lease_s=60)
    roster.expect(fresh, lease)

    # then its lease is among those to be renewed, and a second message finds it there
    assert roster.leases() == [lease]
    assert roster.notify(run.id)
    assert roster.base_models() == {run.base_model}


def test_a_takeover_that_was_overtaken_is_not_admitted(service: Service, engine: Engine) -> None:
    # given a run that was expected with one lease, and then with a later one
    roster = Roster(lambda: None)
    run = service.create_run()
    fresh, first = takeover.acquire(service.storage, run.id, worker_id="w", lease_s=60)
    roster.expect(fresh, first)
    fetched = takeover.fetch(service.storage, engine.models, fresh, first, in_use=())
    replayed = takeover.replay(service.storage, fetched, on_progress=lambda: None)
    roster.expect(fresh, Lease(run.id, "w", first.epoch + 1))

    # then the first does not come into memory
    assert not roster.admit(replayed)
    assert roster.active() == []


def test_waiting_ends_when_the_worker_leaves(service: Service) -> None:
    # given a run that is expected and never comes
    roster, leaving = Roster(lambda: None), threading.Event()
    run = service.create_run()
    fresh, lease = takeover.acquire(service.storage, run.id, worker_id="w", lease_s=60)
    roster.expect(fresh, lease)
    leaving.set()

    # then nobody waits for it
    assert not roster.wait_idle(run.id, timeout_s=60, leaving=leaving)


def test_a_run_whose_takeover_fails_again_and_again_is_given_up(service: Service) -> None:
    # given takeovers that fail
    roster = Roster(lambda: None)
    run = service.create_run()
    for epoch in range(1, FAILURES_MAX + 1):
        assert roster.hopeless(run.id) is None
        roster.forget(Lease(run.id, "w", epoch), "its snapshot is gone")

    # then the reason is what its operations will fail with
    assert roster.hopeless(run.id) == "its snapshot is gone"
