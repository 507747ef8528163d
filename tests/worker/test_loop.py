"""Operations take effect in order, once, and fail alone."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select, update
from structlog.testing import capture_logs

from billing import budgets, pauses
from billing.budgets import Scope
from jobs.operations import (
    Datum,
    Failure,
    ForwardBackward,
    ForwardBackwardOutcome,
    Kind,
    Loaded,
    LoadState,
    OptimStep,
    OptimStepOutcome,
    Saved,
    SaveState,
)
from jobs.sweeper import close_gaps
from storage import journal, leases, runs, snapshots, tables
from storage.errors import ObjectStoreUnavailableError
from storage.runs import Run
from tests.tiny_model import VOCAB_SIZE
from tests.worker.harness import WAIT_S, Engine, Service
from worker import train_turn


def learn(seed: int = 0, *, forward_only: bool = False, length: int = 9) -> ForwardBackward:
    """Cross-entropy on two random sequences."""
    numbers = np.random.RandomState(seed)
    data = tuple(
        Datum(
            numbers.randint(3, VOCAB_SIZE, length),
            {"target_tokens": numbers.randint(3, VOCAB_SIZE, length), "weights": np.ones(length, np.float32)},
        )
        for length in (5, length)
    )
    return ForwardBackward(data, "cross_entropy", {}, forward_only)


def overflow() -> ForwardBackward:
    """Valid by itself, but its ratio is infinite: it fails when it is computed."""
    tokens = np.arange(4, 10)
    inputs = {
        "target_tokens": tokens,
        "logprobs": np.full(6, -1e30, np.float32),
        "advantages": np.ones(6, np.float32),
    }
    return ForwardBackward((Datum(tokens, inputs),), "importance_sampling")


def get_run(service: Service, run: Run) -> Run:
    """The run's row as it is now."""
    with service.storage.database.read() as tx:
        return runs.get_run(tx, run.id)


def test_operations_that_arrive_out_of_order_take_effect_in_order(service: Service, engine: Engine) -> None:
    # given a run whose operations 2 and 3 arrive before 1
    run = service.create_run()
    step = service.submit(run, 2, OptimStep(learning_rate=1e-2))
    after = service.submit(run, 3, learn(forward_only=True))
    engine.take(run)
    assert service.status(step) == "queued"

    # when 1 arrives
    before = service.submit(run, 1, learn())
    engine.take(run)

    # then the step has used its gradients
    first, last = service.outcome(before), service.outcome(after)
    assert isinstance(first, ForwardBackwardOutcome)
    assert isinstance(last, ForwardBackwardOutcome)
    assert last.metrics["loss:sum"] < first.metrics["loss:sum"]
    assert get_run(service, run).state_seq == 3


def test_what_a_cap_has_no_more_room_for_is_not_begun_and_goes_on_when_there_is(
    service: Service, engine: Engine
) -> None:
    # given a run in memory, and an operation that was accepted before the cap was spent
    run = service.create_run()
    engine.take(run)
    service.outcome(f"{run.id}:0")
    waiting = service.submit(run, 1, learn())
    with service.storage.database.begin() as tx:
        now = service.storage.database.now(tx)
        budget = budgets.add(tx, run.account_id, Scope.RUN, run.id, cap=0, now=now)

    # when the engine comes to it
    with capture_logs() as logs:
        engine.take(run)
        deadline = time.monotonic() + WAIT_S
        while not any(one["event"] == "run_paused" for one in logs) and service.status(waiting) != "completed":
            assert time.monotonic() < deadline
            time.sleep(0.005)

    # then it is left as it was
    assert service.status(waiting) == "queued"

    # and when the cap is raised, it is computed
    with service.storage.database.begin() as tx:
        budgets.set_cap(tx, run.account_id, budget.id, 1, now=now)
    engine.take(run)
    assert isinstance(service.outcome(waiting), ForwardBackwardOutcome)


def test_a_paused_run_gets_past_what_has_failed_and_is_left_alone_then(service: Service, engine: Engine) -> None:
    # given a cap that is spent, and before what it pauses an operation that was accepted as failed
    run = service.create_run()
    engine.take(run)
    service.outcome(f"{run.id}:0")
    service.submit(run, 1, Failure("change this"), kind=Kind.FORWARD_BACKWARD)
    waiting = service.submit(run, 2, learn())
    database = service.storage.database
    with database.begin() as tx:
        budgets.add(tx, run.account_id, Scope.RUN, run.id, cap=0, now=database.now(tx))

    # when the engine comes to it
    engine.take(run)
    deadline = time.monotonic() + WAIT_S
    while get_run(service, run).state_seq < 1:
        assert time.monotonic() < deadline
        time.sleep(0.005)

    # then what follows is not begun, and nobody takes the run any more
    with database.read() as tx:
        assert set(pauses.waiting_runs(tx, [run.id], now=database.now(tx))) == {run.id}
    assert service.status(waiting) == "queued"


def test_a_seq_that_never_arrives_is_closed_and_later_ones_go_on(service: Service, engine: Engine) -> None:
    # given an operation that waits behind a gap
    run = service.create_run()
    waiting = service.submit(run, 3, learn(forward_only=True))

    # when the gap has timed out
    closed = close_gaps(service.storage.database, lambda _: None, gap_timeout_s=0.0)
    engine.take(run)

    # then the missing operations have a stored error, and the one behind them is done
    assert closed == [(run.id, 1), (run.id, 2)]
    missing = service.outcome(f"{run.id}:1")
    assert isinstance(missing, Failure)
    assert "seq_id 1 did not arrive" in missing.error
    assert isinstance(service.outcome(waiting), ForwardBackwardOutcome)


def test_a_step_behind_an_unknown_failure_changes_nothing_and_a_later_one_steps(
    service: Service, engine: Engine
) -> None:
    # given good gradients, gradients that fail, and a step submitted before that is known
    run = service.create_run()
    service.submit(run, 1, learn())
    broken = service.submit(run, 2, overflow())
    behind = service.submit(run, 3, OptimStep(learning_rate=0.1))
    unchanged = service.submit(run, 4, learn(forward_only=True))
    engine.take(run)
    failed, step = service.outcome(broken), service.outcome(behind)
    service.outcome(unchanged)

    # when a step is submitted afterwards
    afterwards = service.submit(run, 5, learn())
    known = service.submit(run, 6, OptimStep(learning_rate=0.1))
    engine.take(run)

    # then the first names the failure and changed nothing, and the second is a step
    assert isinstance(failed, Failure)
    assert isinstance(step, Failure)
    assert "seq_id 2" in step.error
    assert service.encoded([unchanged])[0] == service.encoded([afterwards])[0]
    taken = service.outcome(known)
    assert isinstance(taken, OptimStepOutcome)
    assert taken.metrics["step"] == 1


def test_a_step_submitted_before_a_failure_of_an_earlier_turn_fails(service: Service, engine: Engine) -> None:
    # given gradients that fail, a save, which is a turn of its own, and a step, all submitted at once
    run = service.create_run()
    service.submit(run, 1, overflow())
    service.submit(run, 2, SaveState("between"))
    step = service.submit(run, 3, OptimStep())

    # when a worker executes them
    engine.take(run)

    # then the step fails and names them
    failure = service.outcome(step)
    assert isinstance(failure, Failure)
    assert "seq_id 1" in failure.error


def test_a_step_pipelined_behind_a_refused_operation_fails(service: Service, engine: Engine) -> None:
    # given good gradients, and some that were refused, which the client has not been told
    run = service.create_run()
    service.submit(run, 1, learn())
    service.submit(run, 2, Failure("it makes no sense"), kind=Kind.FORWARD_BACKWARD)

    # when a step is pipelined behind them
    step = service.submit(run, 3, OptimStep())
    after = service.submit(run, 4, OptimStep())
    engine.take(run)

    # then it fails and names them, and the gradients are cleared
    failure, next_step = service.outcome(step), service.outcome(after)
    assert isinstance(failure, Failure)
    assert "seq_id 2" in failure.error
    assert isinstance(next_step, OptimStepOutcome)
    assert next_step.metrics["grad_norm"] == 0


def test_a_step_accepted_after_a_known_refusal_uses_what_has_accumulated(service: Service, engine: Engine) -> None:
    # given good gradients, and some that were refused, which the client has been told
    run = service.create_run()
    service.submit(run, 1, learn())
    refused = service.submit(run, 2, Failure("it makes no sense"), kind=Kind.FORWARD_BACKWARD)
    with service.storage.database.begin() as tx:
        journal.note_failure_known(tx, journal.get_operation(tx, refused))

    # when a step is submitted
    step = service.submit(run, 3, OptimStep())
    engine.take(run)

    # then it steps on the good ones
    outcome = service.outcome(step)
    assert isinstance(outcome, OptimStepOutcome)
    assert outcome.metrics["grad_norm"] > 0


def test_a_step_with_nothing_accumulated_has_zero_gradients(service: Service, engine: Engine) -> None:
    # given a fresh run
    run = service.create_run()

    # when it steps
    step = service.submit(run, 1, OptimStep())
    engine.take(run)

    # then that is a step
    outcome = service.outcome(step)
    assert isinstance(outcome, OptimStepOutcome)
    assert outcome.metrics["grad_norm"] == 0


def test_a_name_that_is_taken_fails_the_save_alone(service: Service, engine: Engine) -> None:
    # given a checkpoint
    run = service.create_run()
    first = service.submit(run, 1, SaveState("a"))
    again = service.submit(run, 2, SaveState("a"))
    over = service.submit(run, 3, SaveState("a", overwrite=True))
    engine.take(run)

    # then its name is taken, unless it is to be replaced
    saved = service.outcome(first)
    assert isinstance(saved, Saved)
    assert saved.path == f"tinker://{run.id}/weights/a"
    refused = service.outcome(again)
    assert isinstance(refused, Failure)
    assert "exists already" in refused.error
    assert isinstance(service.outcome(over), Saved)


def test_loading_goes_back_to_what_was_saved(service: Service, engine: Engine) -> None:
    # given a run that is saved, scored, and trained on
    run = service.create_run()
    service.submit(run, 1, SaveState("start"))
    before = service.submit(run, 2, learn(forward_only=True))
    service.submit(run, 3, learn())
    service.submit(run, 4, OptimStep(learning_rate=0.1))

    # when the checkpoint is loaded, by a name given before it was there
    loaded = service.submit(run, 5, LoadState(f"tinker://{run.id}/weights/start", with_optimizer=True))
    after = service.submit(run, 6, learn(forward_only=True))
    engine.take(run)

    # then it computes what it computed then
    assert isinstance(service.outcome(loaded), Loaded)
    assert service.encoded([before]) == service.encoded([after])


def test_another_accounts_checkpoint_cannot_be_told_from_none(service: Service, engine: Engine) -> None:
    # given a run
    run = service.create_run()

    # when it loads what is not there
    loaded = service.submit(run, 1, LoadState("tinker://elsewhere:train:0/weights/x", with_optimizer=False))
    engine.take(run)

    # then the failure says so and no more
    outcome = service.outcome(loaded)
    assert isinstance(outcome, Failure)
    assert "there is no checkpoint" in outcome.error


def test_another_worker_takes_over_bit_for_bit(service: Service) -> None:
    # given a run that one worker has trained, and the same one trained by two
    whole, shared = service.create_run(seed=5), service.create_run(seed=5)
    bodies = [body for step in range(6) for body in (learn(step), OptimStep(learning_rate=1e-2))]
    first, second = Engine(service, "worker-a").start(), Engine(service, "worker-b").start()
    expected = [service.submit(whole, seq, body) for seq, body in enumerate(bodies, start=1)]
    first.take(whole)
    service.encoded(expected)

    # when the first worker is dead to the database in mid-training, without having handed anything over
    halves = [service.submit(shared, seq, body) for seq, body in enumerate(bodies[:5], start=1)]
    first.take(shared)
    service.encoded(halves)
    with service.storage.database.begin() as tx:
        leases.release_worker(tx, "worker-a")
    halves += [service.submit(shared, seq, body) for seq, body in enumerate(bodies[5:], start=6)]
    second.take(shared)

    # then the second has gone on, bit for bit
    assert service.encoded(halves) == service.encoded(expected)
    first.leave()
    second.leave()


def test_a_worker_that_lost_its_lease_commits_nothing(service: Service, engine: Engine) -> None:
    # given a run in a worker's memory
    run = service.create_run()
    service.submit(run, 1, learn())
    engine.take(run)
    service.outcome(f"{run.id}:1")

    # when its lease is given to another, and it goes on all the same
    with service.storage.database.begin() as tx:
        leases.release_worker(tx, engine.name)
        now = service.storage.database.now(tx)
        leases.acquire(tx, run.id, worker_id="other", now=now, expires_at=service.storage.database.after(tx, 60))
    late = service.submit(run, 2, OptimStep())
    engine.loop.roster.notify(run.id)
    engine.loop.wait_idle(run.id, timeout_s=30)

    # then nothing of it is on record
    assert service.status(late) in ("queued", "running")
    assert get_run(service, run).state_seq == 1
    assert late not in engine.published


def test_leaving_writes_the_newest_state_back_and_frees_the_lease(service: Service) -> None:
    # given a worker that has trained a run
    run = service.create_run()
    last = [service.submit(run, seq, body) for seq, body in enumerate([learn(), OptimStep()], start=1)][-1]
    engine = Engine(service, "worker-a").start()
    engine.take(run)
    service.outcome(last)

    # when it leaves
    engine.leave()

    # then a snapshot holds the newest state, and nobody holds the run
    with service.storage.database.read() as tx:
        assert snapshots.newest_seq(tx, run.id) == 2
    assert get_run(service, run).lease_worker is None


def test_a_damaged_snapshot_is_passed_over_for_the_one_before_it(service: Service) -> None:
    # given a run with two snapshots, the newer of which is damaged
    run, twin = service.create_run(seed=9), service.create_run(seed=9)
    engine = Engine(service, "worker-a").start()
    for seq, body in enumerate([learn(), OptimStep(), learn(1), OptimStep()], start=1):
        service.submit(run, seq, body)
        engine.take(run)
        service.outcome(f"{run.id}:{seq}")
        engine.loop.wait_idle(run.id, timeout_s=30)
    engine.leave()
    with service.storage.database.read() as tx:
        newest, older = snapshots.newest_first(tx, run.id)
    path = service.directory / "objects" / newest.object_key
    path.write_bytes(path.read_bytes()[:-1] + b"!")

    # when another worker goes on
    other = Engine(service, "worker-b").start()
    for seq, body in enumerate([learn(), OptimStep(), learn(1), OptimStep(), learn(2)], start=1):
        service.submit(twin, seq, body)
    service.submit(run, 5, learn(2))
    other.take(run)
    other.take(twin)

    # then it has replayed from the older one, and computes the same as a run that was never disturbed
    assert older.seq < newest.seq
    assert service.encoded([f"{run.id}:5"]) == service.encoded([f"{twin.id}:5"])
    other.leave()


def test_a_payload_that_cannot_be_read_fails_alone(service: Service, engine: Engine) -> None:
    # given an operation whose payload is damaged, one whose payload is gone, and a good one of another run
    run, other = service.create_run(), service.create_run()
    damaged = service.submit(run, 1, learn())
    gone = service.submit(run, 2, learn(length=200))
    with service.storage.database.begin() as tx:
        table = tables.operation
        tx.execute(update(table).where(table.c.request_id == damaged).values(payload=b"damaged"))
        key = tx.execute(select(table.c.payload_key).where(table.c.request_id == gone)).scalar_one()
    service.storage.objects.delete([key])
    good = service.submit(other, 1, learn())

    # when a worker comes to them
    engine.take(run)
    engine.take(other)

    # then they fail with words of their own, and the rest goes on
    for broken in (damaged, gone):
        failure = service.outcome(broken)
        assert isinstance(failure, Failure)
        assert "cannot be read" in failure.error
        assert failure.category == "server"
    assert isinstance(service.outcome(good), ForwardBackwardOutcome)


def test_runs_of_one_account_take_turns(service: Service) -> None:
    # given two runs with many operations each, of which one fits into a turn
    first, second = service.create_run(), service.create_run()
    engine = Engine(service, "worker-a", tokens_max=16)
    for run in (first, second):
        for seq in range(1, 9):
            service.submit(run, seq, learn(seq))
        engine.take(run)

    # when a worker executes them
    engine.start()
    service.outcome(f"{first.id}:8")
    service.outcome(f"{second.id}:8")
    engine.leave()

    # then neither has waited for the other's end
    order = [request_id.rpartition(":")[0] for request_id in engine.published]
    assert order.index(second.id) < len(order) - 1 - order[::-1].index(first.id)
    halfway = order[: len(order) // 2]
    assert min(halfway.count(first.id), halfway.count(second.id)) >= 3


def test_an_operation_that_raises_fails_alone(
    service: Service, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a step that raises what nobody expects
    run = service.create_run()

    def break_down(*_: object) -> None:
        raise MemoryError("no memory left")

    monkeypatch.setattr(train_turn, "optim_step", break_down)
    service.submit(run, 1, learn())
    step = service.submit(run, 2, OptimStep())
    engine.take(run)
    failure = service.outcome(step)

    # when the run goes on
    monkeypatch.undo()
    service.submit(run, 3, learn())
    again = service.submit(run, 4, OptimStep())
    engine.loop.wait_idle(run.id, timeout_s=30)
    engine.take(run)

    # then the step has failed and cleared the gradients, and the next one works
    assert isinstance(failure, Failure)
    assert "no memory left" in failure.error
    outcome = service.outcome(again)
    assert isinstance(outcome, OptimStepOutcome)
    assert outcome.metrics["step"] == 1


def test_a_run_at_its_bound_waits_until_the_store_is_back_and_others_go_on(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a bound that any operation exceeds, a store that takes no snapshots, and a run that has reached the bound
    engine = Engine(service, "worker-a", replay_tail_s=1e-9).start()
    run, put = service.create_run(), service.storage.objects.put
    away = threading.Event()
    away.set()

    def put_unless_away(key: str, *args: Any, **kwargs: Any) -> None:
        if away.is_set() and key.startswith("snapshots/"):
            raise ObjectStoreUnavailableError("store", "away")
        put(key, *args, **kwargs)

    monkeypatch.setattr(service.storage.objects, "put", put_unless_away)
    with capture_logs() as logs:
        first = service.submit(run, 1, learn())
        engine.take(run)
        service.outcome(first)
        held, other = service.submit(run, 2, learn(1)), service.create_run()
        engine.take(run)
        beside = service.submit(other, 1, learn(forward_only=True))
        engine.take(other)
        service.outcome(beside)

        # then it waits, and another that has nothing to lose goes on
        assert service.status(held) == "queued"

        # when the store is back, it goes on by itself
        away.clear()
        assert isinstance(service.outcome(held), ForwardBackwardOutcome)
    waits = [line["run"] for line in logs if line["event"] == "run_waits_for_writeback"]
    assert waits.count(run.id) in (1, 2)  # once for each operation at the bound, however often the upload is tried
    engine.leave()
