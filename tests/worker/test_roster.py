"""A run is this worker's from the moment its lease is taken until the lease is given up."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from storage.errors import ObjectStoreUnavailableError
from storage.leases import Lease
from tests.worker.harness import Engine, Service
from worker import roster as roster_module
from worker import takeover
from worker.engine.timing import DeviceClock
from worker.errors import NoStateError
from worker.replay import Replay
from worker.roster import FAILURES_MAX, Roster


def test_an_expected_run_is_renewed_and_not_taken_over_twice(service: Service) -> None:
    # given a run whose lease has been taken and which is still being fetched
    roster = Roster(lambda: None, fetched_max=16, expected_max=16)
    run = service.create_run()
    fresh, lease = takeover.acquire(service.storage, run.id, worker_id="w", lease_s=60)
    roster.expect(fresh, lease)

    # then its lease is among those to be renewed, and a second message finds it there
    assert roster.leases() == [lease]
    assert roster.notify(run.id)
    assert roster.base_models() == {run.base_model}


def test_a_takeover_that_was_overtaken_is_not_admitted(service: Service, engine: Engine) -> None:
    # given a run that was expected with one lease, and then with a later one
    roster = Roster(lambda: None, fetched_max=16, expected_max=16)
    run = service.create_run()
    fresh, first = takeover.acquire(service.storage, run.id, worker_id="w", lease_s=60)
    roster.expect(fresh, first)
    fetched = takeover.fetch(service.storage, engine.models, fresh, first, in_use=())
    replayed = Replay(fetched, DeviceClock(torch.device("cpu")), tokens_max=64, bound=0.0).finish()
    roster.expect(fresh, Lease(run.id, "w", first.epoch + 1))

    # then the first does not come into memory
    assert not roster.admit(replayed)
    assert roster.active() == []


def test_waiting_ends_when_the_worker_leaves(service: Service) -> None:
    # given a run that is expected and never comes
    roster, leaving = Roster(lambda: None, fetched_max=16, expected_max=16), threading.Event()
    run = service.create_run()
    fresh, lease = takeover.acquire(service.storage, run.id, worker_id="w", lease_s=60)
    roster.expect(fresh, lease)
    leaving.set()

    # then nobody waits for it
    assert not roster.wait_idle(run.id, timeout_s=60, leaving=leaving)


def test_a_run_whose_takeover_fails_again_and_again_is_given_up(service: Service) -> None:
    # given takeovers that fail
    roster = Roster(lambda: None, fetched_max=16, expected_max=16)
    run = service.create_run()
    for epoch in range(1, FAILURES_MAX + 1):
        assert roster.hopeless(Lease(run.id, "w", epoch)) is None
        roster.forget(Lease(run.id, "w", epoch), NoStateError(run.id, "its snapshot is gone"))

    # then the reason is what its operations will fail with
    assert "its snapshot is gone" in str(roster.hopeless(Lease(run.id, "w", FAILURES_MAX + 1)))

    # but no longer once another worker has had it
    assert roster.hopeless(Lease(run.id, "w", FAILURES_MAX + 2)) is None


def test_a_takeover_that_finds_no_memory_is_not_held_against_the_run(service: Service) -> None:
    # given
    roster, run = Roster(lambda: None, fetched_max=16, expected_max=16), service.create_run()

    # when
    for epoch in range(1, 10):
        roster.forget(Lease(run.id, "w", epoch), MemoryError())

    # then
    assert roster.hopeless(Lease(run.id, "w", 10)) is None


def test_a_run_whose_lease_is_lost_is_expected_no_more(service: Service) -> None:
    # given
    roster, run = Roster(lambda: None, fetched_max=16, expected_max=16), service.create_run()
    fresh, lease = takeover.acquire(service.storage, run.id, worker_id="w", lease_s=60)
    roster.expect(fresh, lease)

    # when
    lost = roster.drop_all_but([], roster.leases())

    # then this worker may take it over anew
    assert lost == [lease]
    assert not roster.expects(lease)
    assert not roster.notify(run.id)


def test_a_takeover_that_storage_prevents_is_tried_for_ever_with_growing_pauses(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a store that is away for longer than any number of attempts
    now = 1000.0
    monkeypatch.setattr(roster_module.time, "monotonic", lambda: now)
    roster, run = Roster(lambda: None, fetched_max=16, expected_max=16), service.create_run()
    pauses_s = []
    for epoch in range(1, 10):
        roster.forget(Lease(run.id, "w", epoch), ObjectStoreUnavailableError("s3", "away"))
        began_at = now
        while roster.pauses(run.id):
            now += 0.5
        pauses_s.append(now - began_at)

    # then it is never given up, and the attempts come ever less often
    assert roster.hopeless(Lease(run.id, "w", 10)) is None
    assert pauses_s == [1, 2, 4, 8, 16, 30, 30, 30, 30]


def _expect(service: Service, roster: Roster, *, is_suspect: bool = False) -> takeover.Takeover:
    run = service.create_run()
    fresh, lease = takeover.acquire(service.storage, run.id, worker_id="w", lease_s=60)
    fresh = replace(fresh, replays_alone=is_suspect)
    roster.expect(fresh, lease)
    return takeover.Takeover(fresh, lease)


def _has_room(roster: Roster) -> bool:
    with roster.room(timeout_s=0) as has_room:
        return has_room


def test_so_many_runs_may_be_fetched_at_once_and_more_may_wait_for_their_replay(service: Service) -> None:
    # given
    roster = Roster(lambda: None, fetched_max=1, expected_max=2)
    assert _has_room(roster)

    # when one is being fetched, has arrived, and another one too
    rooms = []
    for _ in range(2):
        coming = _expect(service, roster)
        rooms.append(_has_room(roster))
        roster.arrive(coming)
        rooms.append(_has_room(roster))

    # then there is room once nobody is on the way, until too many wait
    assert rooms == [False, True, False, False]


def test_a_run_whose_replay_has_no_company_lets_nobody_in_until_it_is_there(service: Service) -> None:
    # given a run that is being fetched, and a suspect one
    roster = Roster(lambda: None, fetched_max=16, expected_max=16)
    other, suspect = _expect(service, roster), _expect(service, roster, is_suspect=True)
    assert not _has_room(roster)

    # when both have arrived
    roster.arrive(suspect)
    assert roster.is_fetching
    roster.arrive(other)

    # then nothing is being fetched any more, and nobody comes before the suspect is through
    assert not roster.is_fetching
    assert not _has_room(roster)
    roster.forget(suspect.lease, NoStateError(suspect.run.id, "its snapshot is gone"))
    assert _has_room(roster)
