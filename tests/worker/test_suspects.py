"""A worker dies with some operations: they run alone, one fails if it goes on killing, and the others do not notice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest

from jobs.operations import Body, Failure, ForwardBackwardOutcome, OptimStep, OptimStepOutcome
from storage import deaths, journal, leases
from storage.deaths import Cause
from storage.errors import ObjectStoreRefusedError
from storage.journal import Operation
from storage.runs import Run
from tests.worker.harness import Engine, Service
from tests.worker.test_loop import learn
from worker.train_turn import TrainTurn


def die_with(service: Service, runs: Sequence[Run], request_ids: Sequence[str], cause: Cause = Cause.FAULT) -> None:
    """Play a worker that begins these operations together, and dies."""
    database = service.storage.database
    with database.begin() as tx:
        now = database.now(tx)
        for run in runs:
            leases.acquire(tx, run.id, worker_id="dead", now=now, expires_at=now + timedelta(seconds=10))
        begun = [journal.get_operation(tx, request_id).id for request_id in request_ids]
        journal.start(tx, begun, worker_id="dead", now=now, alone=len(begun) == 1)
        deaths.note_death(tx, "dead", cause, now=now)


def created(service: Service, engine: Engine, number: int) -> list[Run]:
    """Runs whose operation 0 is done."""
    runs = [service.create_run(seed=seed) for seed in range(number)]
    for run in runs:
        engine.take(run)
    for run in runs:
        service.outcome(f"{run.id}:0")
    return runs


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Request ids of what each turn began, in order."""
    seen: list[list[str]] = []
    execute = TrainTurn._execute

    def remember(self: TrainTurn, plans: Any) -> Any:
        begun: list[Operation] = [operation for plan in plans for operation in plan.begun]
        seen.append([operation.request_id for operation in begun])
        return execute(self, plans)

    monkeypatch.setattr(TrainTurn, "_execute", remember)
    return seen


def with_first_engine(service: Service, number: int) -> list[Run]:
    """Runs that a first worker has created and let go of."""
    first = Engine(service, "first").start()
    try:
        return created(service, first, number)
    finally:
        first.leave()


def submit_steps(service: Service, run: Run, num_pairs: int = 2) -> list[str]:
    """Pairs of `forward_backward` and `optim_step` after operation 0."""
    bodies: list[Body] = [body for seed in range(num_pairs) for body in (learn(seed), OptimStep(learning_rate=1e-2))]
    return [service.submit(run, seq, body) for seq, body in enumerate(bodies, start=1)]


def take_together(engine: Engine, runs: Sequence[Run]) -> None:
    """Have all runs in memory before the first turn."""
    for run in runs:
        engine.take(run)
    engine.start()


def test_suspects_run_alone_and_compute_what_they_would_have_computed_together(
    service: Service, turns: list[list[str]]
) -> None:
    # given equal operations of two pairs of runs, and a worker that died with those of the second pair
    undisturbed, disturbed = with_first_engine(service, 2), with_first_engine(service, 2)
    expected = [submit_steps(service, run) for run in undisturbed]
    asked = [submit_steps(service, run) for run in disturbed]
    died_with = [asked[0][0], asked[1][0]]
    die_with(service, disturbed, died_with)
    turns.clear()

    # when another worker takes all of them over
    engine = Engine(service, "second")
    take_together(engine, [*disturbed, *undisturbed])
    outcomes = [service.encoded(ids) for ids in (*asked, *expected)]
    engine.leave()

    # then each suspect had a turn to itself, others were packed, and company changed nothing
    assert all([request_id] in turns for request_id in died_with)
    assert any(len(turn) > 2 for turn in turns)
    assert [one[0::2] for one in outcomes[:2]] == [one[0::2] for one in outcomes[2:]]


def test_others_have_their_turns_between_suspects(service: Service, turns: list[list[str]]) -> None:
    # given a run with many suspects, and another of the same account with innocents
    suspected, innocent = with_first_engine(service, 2)
    suspects = [service.submit(suspected, seq, learn(seq)) for seq in range(1, 7)]
    others = submit_steps(service, innocent, num_pairs=3)
    die_with(service, [suspected], suspects)
    turns.clear()

    # when they are executed
    engine = Engine(service, "second")
    take_together(engine, [suspected, innocent])
    for request_id in (*suspects, *others):
        assert not isinstance(service.outcome(request_id), Failure)
    engine.leave()

    # then the innocents did not wait for all suspects, nor the suspects for all innocents
    first_pair = next(place for place, turn in enumerate(turns) if others[1] in turn)
    last_pair = next(place for place, turn in enumerate(turns) if others[5] in turn)
    assert first_pair < turns.index([suspects[2]])
    assert turns.index([suspects[0]]) < last_pair


def test_an_operation_that_keeps_ending_its_worker_fails_and_the_step_behind_it_too(service: Service) -> None:
    # given an operation that has ended three workers alone, and a step behind it
    (run,) = with_first_engine(service, 1)
    before, poison, step = (
        service.submit(run, seq, body) for seq, body in enumerate((learn(1), learn(2), OptimStep()), start=1)
    )
    die_with(service, [run], [before, poison])
    for _ in range(3):
        die_with(service, [run], [poison])

    # when another worker comes to it
    engine = Engine(service, "second").start()
    engine.take(run)

    # then it fails with words, without being tried once more, and the step pipelined behind it changes nothing
    failure = service.outcome(poison)
    assert isinstance(failure, Failure)
    assert "ended its worker 3 times while it ran alone" in failure.error
    assert isinstance(service.outcome(before), ForwardBackwardOutcome)
    refused = service.outcome(step)
    assert isinstance(refused, Failure)
    assert "forward_backward with seq_id 2 failed" in refused.error
    with service.storage.database.read() as tx:
        assert journal.get_operation(tx, poison).attempts == 4

    # and the run goes on
    again = [service.submit(run, 4, learn(2)), service.submit(run, 5, OptimStep())]
    engine.take(run)
    assert isinstance(service.outcome(again[1]), OptimStepOutcome)
    engine.leave()


def test_a_condemned_step_clears_the_gradients(service: Service) -> None:
    # given a step that ends workers, after a forward_backward
    (run,) = with_first_engine(service, 1)
    service.submit(run, 1, learn(1))
    poison = service.submit(run, 2, OptimStep(learning_rate=1e-2))
    for _ in range(3):
        die_with(service, [run], [poison])

    # when it has failed and one more pair follows
    engine = Engine(service, "second", warm_s=1e9).start()
    engine.take(run)
    assert isinstance(service.outcome(poison), Failure)
    pair = [service.submit(run, 3, learn(3)), service.submit(run, 4, OptimStep(learning_rate=1e-2))]
    engine.take(run)
    live = service.outcome(pair[1])
    engine.leave()

    # then the step used the gradients of its own pair alone
    (fresh,) = with_first_engine(service, 1)
    only = [service.submit(fresh, 1, learn(3)), service.submit(fresh, 2, OptimStep(learning_rate=1e-2))]
    third = Engine(service, "third").start()
    third.take(fresh)
    alone = service.outcome(only[1])
    third.leave()
    assert isinstance(live, OptimStepOutcome)
    assert isinstance(alone, OptimStepOutcome)
    assert live.metrics == alone.metrics


@pytest.mark.parametrize("wanting", [MemoryError("out of memory"), RuntimeError("DefaultCPUAllocator: 10 bytes")])
def test_of_a_pass_that_wants_memory_only_what_does_not_fit_alone_fails(
    service: Service, monkeypatch: pytest.MonkeyPatch, wanting: Exception
) -> None:
    # given three runs, of which one submits what does not fit
    runs = with_first_engine(service, 3)
    sizes = (7, 30, 7)
    asked = [service.submit(run, 1, learn(1, length=size)) for run, size in zip(runs, sizes, strict=True)]
    engine = Engine(service, "second")
    trainer = engine.models.get("tiny", in_use=()).trainer
    calls: list[int] = []
    monkeypatch.setattr(trainer, "run", short_of_memory(trainer.run, wanting, calls))

    # when they are packed together
    take_together(engine, runs)
    outcomes = [service.outcome(request_id) for request_id in asked]
    engine.leave()

    # then each was tried alone, and one fails with words
    assert calls == [3, 1, 1, 1]
    assert [isinstance(outcome, Failure) for outcome in outcomes] == [False, True, False]
    assert "does not fit into the worker's memory, even alone" in str(outcomes[1])


def short_of_memory(run: Callable[..., Any], error: Exception, calls: list[int]) -> Callable[..., Any]:
    """A trainer that raises for datums of more than 20 tokens, and counts the operations of each call."""

    def call(requests: Sequence[Any], **arguments: Any) -> Any:
        calls.append(len(requests))
        if any(len(datum.tokens) > 20 for request in requests for datum in request.body.data):
            raise error
        return run(requests, **arguments)

    return call


@pytest.mark.parametrize("cause", [Cause.HAND, Cause.UNKNOWN])
def test_kills_around_an_innocent_operation_fail_nothing(service: Service, cause: Cause) -> None:
    # given an operation around which workers were killed, as often as may be
    (run,) = with_first_engine(service, 1)
    operation = service.submit(run, 1, learn())
    for _ in range({Cause.HAND: 50, Cause.UNKNOWN: 9}[cause]):
        die_with(service, [run], [operation], cause)

    # when it runs at last
    engine = Engine(service, "second").start()
    engine.take(run)

    # then it completes
    assert isinstance(service.outcome(operation), ForwardBackwardOutcome)
    engine.leave()


def test_an_object_store_that_refuses_ends_the_engine_and_not_the_operation(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given an object store that takes nothing more
    (run,) = with_first_engine(service, 1)
    operation = service.submit(run, 1, learn(1, length=400))
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    engine = Engine(service, "second")
    with monkeypatch.context() as refusing:
        refusing.setattr(service.storage.payloads, "put", refuse)

        # when its engine ends
        engine.take(run)
        engine.start()
        engine.loop.join(60)

    # then it says that storage did it, and another worker completes what it was doing
    assert engine.loop.is_cut_off
    assert not engine.loop.is_alive()
    with service.storage.database.begin() as tx:
        deaths.note_death(tx, "second", Cause.STOPPED, now=service.storage.database.now(tx))
    third = Engine(service, "third").start()
    third.take(run)
    assert isinstance(service.outcome(operation), ForwardBackwardOutcome)
    third.leave()


def refuse(*_: object) -> None:
    """Wrong credentials."""
    raise ObjectStoreRefusedError("the store", "wrong credentials")
