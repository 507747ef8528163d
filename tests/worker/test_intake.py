"""A task returns within its slice, however long a run takes to fetch; a message counts only until it expires."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from billing import budgets
from billing.budgets import Scope
from storage import leases, runs
from storage.leases import Lease
from tests.announcements import Announcements
from tests.factories import make_operation, make_run
from tests.worker.harness import Service
from worker import intake as intake_module
from worker.intake import RunIntake
from worker.roster import Roster
from worker.settings import WorkerSettings

PATIENCE_S = 180.0
SLICE_S = 0.05


class FetchAtWill:
    """Stands in for `takeover.fetch`: lasts until the test allows it to end, or raises."""

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.error: Exception | None = None
        self.begun: list[str] = []

    def __call__(self, _storage: Any, _models: Any, run: Any, lease: Lease, *, in_use: Any) -> Any:
        self.begun.append(run.id)
        assert self.may_end.wait(PATIENCE_S)
        if self.error is not None:
            raise self.error
        return SimpleNamespace(run=run, lease=lease, tail=())


class Intake:
    """A `RunIntake` with a roster and no engine behind it."""

    def __init__(self, service: Service, *, concurrency: int = 2) -> None:
        self.storage = service.storage
        self.roster = Roster(lambda: None, fetched_max=concurrency, expected_max=concurrency)
        self.announced = Announcements()
        engine = SimpleNamespace(
            roster=self.roster,
            models_in_use=set,
            wait_idle=lambda run_id, timeout_s: self.roster.wait_idle(
                run_id, timeout_s=timeout_s, leaving=threading.Event()
            ),
        )
        settings = WorkerSettings(slice_s=SLICE_S, concurrency=concurrency)
        parts: Any = (self.storage, engine, None, self.announced, settings)
        self._intake = RunIntake(*parts, worker_id="w")

    def advance(self, run_id: str, *, expires_in_s: float = 60.0) -> None:
        """What a task does."""
        expires_at = self.storage.database.clock.now() + timedelta(seconds=expires_in_s)
        self._intake.advance(run_id, expires_at=expires_at)

    def make_run(self, number: int = 0) -> str:
        """A run that nobody holds."""
        with self.storage.database.begin() as tx:
            return make_run(tx, model_seq_id=number).id

    def holder(self, run_id: str) -> str | None:
        """Who holds a run's lease."""
        with self.storage.database.read() as tx:
            return leases.find_holder(tx, run_id, now=self.storage.database.now(tx))


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch) -> FetchAtWill:
    """How long fetching takes."""
    stand_in = FetchAtWill()
    monkeypatch.setattr(intake_module.takeover, "fetch", stand_in)
    return stand_in


def test_a_task_hands_its_run_back_while_the_state_is_still_being_fetched(service: Service, fetch: FetchAtWill) -> None:
    # given a run whose state takes for ever to come
    intake = Intake(service)
    run = intake.make_run()

    # when a task attends to it, and the next one
    intake.advance(run)
    intake.advance(run)

    # then each returned and announced the run again; it is fetched once, and its lease is kept meanwhile
    assert intake.announced.runs == [run, run]
    assert fetch.begun == [run]
    assert [lease.run_id for lease in intake.roster.leases()] == [run]

    # and when it has come, the engine finds it
    fetch.may_end.set()
    arrived = _until(intake.roster.take_arrived)
    assert [takeover.run.id for takeover in arrived] == [run]


def test_a_run_that_a_cap_pauses_is_left_alone_until_there_is_room(service: Service, fetch: FetchAtWill) -> None:
    # given a run whose next operation costs something, under a cap that is spent
    intake = Intake(service)
    run_id = intake.make_run()
    with service.storage.database.begin() as tx:
        run = runs.get_run(tx, run_id)
        make_operation(tx, run)
        budget = budgets.add(tx, run.account_id, Scope.RUN, run_id, cap=0, now=service.storage.database.now(tx))

    # when a task attends to it
    intake.advance(run_id)

    # then nobody holds it
    assert intake.holder(run_id) is None
    assert intake.announced.runs == []

    # and when the cap is raised, it is taken
    with service.storage.database.begin() as tx:
        budgets.set_cap(tx, run.account_id, budget.id, 1, now=service.storage.database.now(tx))
    intake.advance(run_id)
    assert intake.holder(run_id) == "w"
    fetch.may_end.set()


def test_many_messages_at_once_take_a_run_over_once(service: Service, fetch: FetchAtWill) -> None:
    # given a run that was announced often while no worker was there
    intake = Intake(service, concurrency=16)
    run = intake.make_run()

    # when a worker gets all the messages at once
    with ThreadPoolExecutor(8) as tasks:
        list(tasks.map(lambda _: intake.advance(run), range(8)))

    # then it takes the run once
    assert fetch.begun == [run]
    assert [lease.epoch for lease in intake.roster.leases()] == [1]
    fetch.may_end.set()


def test_no_more_runs_are_on_their_way_into_memory_than_there_are_tasks(service: Service, fetch: FetchAtWill) -> None:
    # given a worker with as many runs on their way as it may have: some have been fetched, none has been replayed
    intake = Intake(service, concurrency=2)
    runs = [intake.make_run(number) for number in range(3)]
    fetch.may_end.set()
    for run in runs[:2]:
        intake.advance(run)
    arrived: list[Any] = []
    _until(lambda: arrived.extend(intake.roster.take_arrived()) or len(arrived) == 2)

    # when another run has work
    intake.advance(runs[2])

    # then it is handed back, for whoever has room
    assert intake.announced.runs == runs
    assert len(intake.roster.leases()) == 2

    # and when one of them is there, or is to be had no more, its place is free
    intake.roster.drop_all_but([runs[0]], intake.roster.leases())
    intake.advance(runs[2])
    assert {lease.run_id for lease in intake.roster.leases()} == {runs[0], runs[2]}


def test_a_run_that_cannot_be_fetched_is_given_up_and_makes_room(service: Service, fetch: FetchAtWill) -> None:
    # given a worker that fetches one run at a time, and a run that cannot be
    intake = Intake(service, concurrency=1)
    broken, whole = (intake.make_run(number) for number in range(2))
    fetch.error = OSError("the disk is full")
    fetch.may_end.set()

    # when it is tried
    intake.advance(broken)
    _until(lambda: intake.holder(broken) is None)
    fetch.error = None

    # then nobody holds it, and the next one is fetched
    def arrived() -> list[Any]:
        intake.advance(whole)
        return intake.roster.take_arrived()

    assert [takeover.run.id for takeover in _until(arrived)] == [whole]


def test_a_message_that_has_expired_takes_no_run(service: Service, fetch: FetchAtWill) -> None:
    # given a message that a broker has kept for long, or has delivered again
    intake = Intake(service)
    run = intake.make_run()

    # when a task gets it
    intake.advance(run, expires_in_s=-1)

    # then it does nothing: the run has been announced since
    assert fetch.begun == []
    assert intake.announced.runs == []


def _until(look: Any) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found
