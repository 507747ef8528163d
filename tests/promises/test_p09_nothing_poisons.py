"""P9: a bad operation fails alone, with an error that says what to change; workers and other runs go on."""

from __future__ import annotations

from typing import Any

import pytest

from storage.failpoints import Point
from tests.promises.kit import PROGRAM, PatientWire, batch, billed
from tests.setups.deployment import Deployment
from tests.setups.poison.sitecustomize import CRASH, NOT_TO_BE_REPLAYED
from tests.tiny_model import VOCAB_SIZE
from tests.wire.messages import datum, forward_backward

pytestmark = pytest.mark.processes

Undisturbed = tuple[list[Any], list[list[tuple[Any, ...]]]]
NUM_KILLS = 4
OUTSIDE = [datum([5, VOCAB_SIZE, 6])]


def bad_forward_backward(wire: PatientWire, run: str, seq: int) -> str:
    """A `forward_backward` with a token that does not exist."""
    return wire.submit_protobuf(forward_backward(run, seq, OUTSIDE))


def step_with(wire: PatientWire, run: str, seq: int, learning_rate: str) -> str:
    """A step whose learning rate is written as given."""
    body = f'{{"model_id": "{run}", "seq_id": {seq}, "adam_params": {{"learning_rate": {learning_rate}}}}}'
    return wire.submit("optim_step", content=body, headers={"Content-Type": "application/json"})


def test_bad_operations_fail_alone_and_say_what_to_change(wire: PatientWire, undisturbed: Undisturbed) -> None:
    # given two runs, into whose turns all kinds of nonsense are mixed
    good, mixed = wire.run(0), wire.run(1)
    nonsense = [
        (bad_forward_backward(wire, mixed, 1), f"token id {VOCAB_SIZE} is outside the vocabulary"),
        (step_with(wire, mixed, 2, "NaN"), "learning_rate"),
        (step_with(wire, mixed, 3, "-1"), "learning_rate"),
        (wire.submit_protobuf(forward_backward(mixed, 4, batch(1), loss_fn="no_such_loss")), "no_such_loss"),
        (wire.submit("save_weights", {"model_id": mixed, "seq_id": 5, "path": "a/b"}), "checkpoint name"),
        (
            wire.submit("load_weights", {"model_id": mixed, "seq_id": 6, "path": "tinker://no/weights/such"}),
            "no checkpoint",
        ),
        (wire.submit_protobuf(forward_backward(mixed, 7, [])), "data"),
    ]
    beside = [wire.submit_seq(good, seq) for seq in (1, 2)]

    # then each fails by itself, and says what is wrong
    for request_id, words in nonsense:
        failure = wire.failure(request_id)
        assert failure["category"] == "user"
        assert words in failure["error"]

    # and the other run has not noticed; the same run goes on as if nothing had been
    assert [wire.result(request_id) for request_id in beside] == undisturbed[0][:2]
    assert wire.result(wire.submit_protobuf(forward_backward(mixed, 8, batch(1)))) == undisturbed[0][0]


def test_a_step_pipelined_behind_a_failure_names_it_and_clears_the_gradients(
    wire: PatientWire, undisturbed: Undisturbed
) -> None:
    # given gradients that have been accumulated, a forward_backward that will fail, and a step right behind it
    run = wire.run()
    wire.result(wire.submit_protobuf(forward_backward(run, 1, batch(99))))
    bad, behind = bad_forward_backward(wire, run, 2), wire.step(run, 3)

    # when both have failed
    wire.failure(bad)
    failure = wire.failure(behind)

    # then the step has named the culprit and moved nothing, and the gradients are gone: the run is as new
    assert "seq_id 2 failed" in failure["error"]
    assert wire.result(wire.submit_protobuf(forward_backward(run, 4, batch(1)))) == undisturbed[0][0]
    assert wire.result(wire.step(run, 5)) == undisturbed[0][1]


def test_a_step_accepted_after_the_client_knew_steps_on_what_has_accumulated(
    wire: PatientWire, undisturbed: Undisturbed
) -> None:
    # given gradients that have been accumulated, and a failure that the client has been told of
    run = wire.run()
    assert wire.result(wire.submit_protobuf(forward_backward(run, 1, batch(1)))) == undisturbed[0][0]
    wire.failure(bad_forward_backward(wire, run, 2))

    # when it steps all the same
    stepped = wire.result(wire.step(run, 3))

    # then the step is that of the good gradients alone
    assert stepped == undisturbed[0][1]


def test_a_step_with_nothing_accumulated_is_a_step_with_zero_gradients(wire: PatientWire) -> None:
    # given a new run
    run = wire.run()

    # when it steps
    stepped = wire.result(wire.step(run, 1))

    # then that is a step like any other
    assert stepped["metrics"]["grad_norm"] == 0


def test_an_innocent_operation_outlives_any_number_of_kills(
    service: Deployment, wire: PatientWire, undisturbed: Undisturbed
) -> None:
    # given an operation whose worker is killed each time that it has just been computed, more often than poison may
    run = wire.run()
    service.arm(Point.TURN_COMPUTED)
    request_id = wire.submit_seq(run, 1)
    for _ in range(NUM_KILLS - 1):
        service.fired(Point.TURN_COMPUTED)
        service.arm(Point.TURN_COMPUTED)
    service.fired(Point.TURN_COMPUTED)

    # then it completes all the same: a kill from outside is nobody's fault
    assert wire.result(request_id) == undisturbed[0][0]
    operation = billed(service, run=run)[1]
    assert (operation.attempts, operation.amounts) == (NUM_KILLS + 1, undisturbed[1][0])


def test_an_operation_that_keeps_killing_its_workers_fails_alone(
    service: Deployment, wire: PatientWire, undisturbed: Undisturbed
) -> None:
    # given a run that submits poison with a step behind it, and another one at work beside it
    innocent, victim = wire.run(0), wire.run(1)
    poison = wire.submit_protobuf(forward_backward(victim, 1, [datum([CRASH, 5, 6])]))
    behind = wire.step(victim, 2)
    beside = [wire.submit_seq(innocent, seq) for seq in PROGRAM]

    # when it has ended as many workers as it may
    failure = wire.failure(poison)

    # then it has failed by itself, and says so; the other run has not noticed, and its own goes on
    assert "ended its worker" in failure["error"]
    assert "seq_id 1 failed" in wire.failure(behind)["error"]
    assert [wire.result(request_id) for request_id in beside] == undisturbed[0]
    assert wire.result(wire.submit_protobuf(forward_backward(victim, 3, batch(1)))) == undisturbed[0][0]
    assert [operation.usage for operation in billed(service, run=victim)[1:3]] == [[], []]


def test_a_replay_that_keeps_killing_its_workers_is_given_up_alone(
    service: Deployment, wire: PatientWire, undisturbed: Undisturbed
) -> None:
    # given a run whose first operation has completed, and cannot be computed again without a crash
    innocent, victim = wire.run(0), wire.run(1)
    (service.directory / "data" / NOT_TO_BE_REPLAYED).write_text(victim)

    # when its worker dies before the state is written back, the next one replays it, dies, and so on
    service.arm(Point.COMMITTED)
    done = wire.submit_seq(victim, 1)
    service.fired(Point.COMMITTED)
    behind = wire.submit_seq(victim, 2)
    beside = [wire.submit_seq(innocent, seq) for seq in PROGRAM]
    failure = wire.failure(behind)

    # then the run's operations fail and say so; what was done stays done, and the other run has not noticed
    assert "cannot be brought back" in failure["error"]
    assert "3 x it crashed" in failure["error"]
    assert wire.result(done) == undisturbed[0][0]
    assert [wire.result(request_id) for request_id in beside] == undisturbed[0]
