from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from jobs.operations import Array, Datum, Failure, ForwardBackward, ForwardBackwardOutcome, LoraConfig
from tests.worker.engine.factories import make_datum, make_operation, make_policy_datum, make_state, make_trainer
from tests.worker.engine.models import make_base_model
from worker.engine.base_model import BaseModel
from worker.engine.trainer import TrainRequest


@pytest.fixture(scope="module")
def base_model() -> BaseModel:
    return make_base_model("qwen3")


def run_one(base_model: BaseModel, body: ForwardBackward, lora: LoraConfig | None = None) -> tuple[object, Array]:
    state = make_state(base_model, lora)
    outcome = make_trainer(base_model).run([TrainRequest(state, body)]).outcomes[0]
    return outcome, state.gradients.flat.numpy()


def test_cross_entropy_is_linear_in_its_weights(base_model: BaseModel) -> None:
    # given the same datum with weights w, v and 2w − 3v
    datum = make_datum(9)
    w, v = (np.random.default_rng(seed).normal(size=9).astype(np.float32) for seed in (1, 2))

    def gradients(weights: Array) -> Array:
        body = ForwardBackward((Datum(datum.tokens, {**datum.inputs, "weights": weights}),), "cross_entropy")
        return run_one(base_model, body)[1]

    # when, then
    wanted = 2 * gradients(w) - 3 * gradients(v)
    np.testing.assert_allclose(gradients(2 * w - 3 * v), wanted, rtol=0, atol=2e-4 * np.abs(wanted).max())


def test_absent_weights_are_ones(base_model: BaseModel) -> None:
    datum = make_datum(9)
    ones = Datum(datum.tokens, {**datum.inputs, "weights": np.ones(9, np.float32)})
    outcome, gradients = run_one(base_model, ForwardBackward((datum, ones), "cross_entropy"))
    wanted, wanted_gradients = run_one(base_model, ForwardBackward((ones, ones), "cross_entropy"))
    assert isinstance(outcome, ForwardBackwardOutcome)
    assert isinstance(wanted, ForwardBackwardOutcome)
    assert outcome.metrics == wanted.metrics
    np.testing.assert_array_equal(gradients, wanted_gradients)


def test_forward_accumulates_nothing(base_model: BaseModel) -> None:
    state = make_state(base_model)
    report = make_trainer(base_model).run([TrainRequest(state, make_operation(forward_only=True))])
    assert isinstance(report.outcomes[0], ForwardBackwardOutcome)
    assert not state.gradients.flat.any()
    assert state.num_accumulated == 0


def test_gradients_accumulate_over_calls(base_model: BaseModel) -> None:
    state, trainer = make_state(base_model), make_trainer(base_model)
    trainer.run([TrainRequest(state, make_operation())])
    once = state.gradients.flat.clone()
    trainer.run([TrainRequest(state, make_operation())])
    torch.testing.assert_close(state.gradients.flat, 2 * once)
    assert state.num_accumulated == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (ForwardBackward((), "cross_entropy"), "data"),
        (ForwardBackward((make_datum(),), "gspo"), "gspo"),
        (ForwardBackward((make_datum(), make_datum(300)), "cross_entropy"), r"data\[1\].*context"),
        (ForwardBackward((replace(make_datum(), tokens=np.full(7, 96)),), "cross_entropy"), r"data\[0\]"),
        (ForwardBackward((make_datum(),), "ppo"), "logprobs"),
    ],
    ids=["empty", "loss", "context", "vocabulary", "inputs"],
)
def test_malformed_operation_fails_alone_without_work(
    base_model: BaseModel, body: ForwardBackward, message: str
) -> None:
    # given a good neighbour
    state, other = make_state(base_model), make_state(base_model)
    # when
    report = make_trainer(base_model).run([TrainRequest(state, body), TrainRequest(other, make_operation())])
    # then
    failure = report.outcomes[0]
    assert isinstance(failure, Failure)
    assert re.search(message, failure.error), failure.error
    assert isinstance(report.outcomes[1], ForwardBackwardOutcome)
    assert report.work[0] == 0
    assert report.work[1] > 0
    assert not state.gradients.flat.any()


def test_loss_that_is_not_finite_names_its_datum_and_accumulates_nothing(base_model: BaseModel) -> None:
    # given an importance ratio that overflows, in the second pass of an operation
    bad = make_policy_datum(40, seed=2)
    bad.inputs["logprobs"][30] = -1e9
    body = ForwardBackward((make_policy_datum(40), make_policy_datum(40, seed=1), bad), "importance_sampling")
    state = make_state(base_model)
    # when
    report = make_trainer(base_model, tokens_max=64).run([TrainRequest(state, body)])
    # then
    failure = report.outcomes[0]
    assert isinstance(failure, Failure)
    assert "data[2]" in failure.error
    assert not state.gradients.flat.any()
    assert state.num_accumulated == 0
    assert report.work[0] > 0


def test_advantage_of_zero_masks_whatever_the_sampler_said(base_model: BaseModel) -> None:
    datum = make_policy_datum(12)
    datum.inputs["logprobs"][datum.inputs["advantages"] == 0] = -1e9
    for loss_fn in ("importance_sampling", "ppo", "cispo"):
        outcome, gradients = run_one(base_model, ForwardBackward((datum,), loss_fn))
        assert isinstance(outcome, ForwardBackwardOutcome), outcome
        assert np.isfinite(gradients).all()


@pytest.mark.parametrize("loss_fn", ["ppo", "cispo"])
def test_thresholds_may_come_per_token(base_model: BaseModel, loss_fn: str) -> None:
    # given the same thresholds as settings and as inputs
    datum = make_policy_datum(12)
    bounds = {"clip_low_threshold": 0.1, "clip_high_threshold": 2.5}
    inputs = {name: np.full(12, value, np.float32) for name, value in bounds.items()}
    # when
    by_setting = run_one(base_model, ForwardBackward((datum,), loss_fn, bounds))
    by_input = run_one(base_model, ForwardBackward((Datum(datum.tokens, {**datum.inputs, **inputs}),), loss_fn))
    default = run_one(base_model, ForwardBackward((datum,), loss_fn))
    # then
    np.testing.assert_array_equal(by_setting[1], by_input[1])
    assert not np.array_equal(by_setting[1], default[1])


def test_work_grows_with_tokens_and_is_twice_as_much_with_backward(base_model: BaseModel) -> None:
    state, trainer = make_state(base_model), make_trainer(base_model)
    bodies = [make_operation((8,)), make_operation((16,)), make_operation((8,), forward_only=True)]
    work = trainer.run([TrainRequest(state, body) for body in bodies]).work
    assert work[1] > 2 * work[0]
    assert work[0] == 2 * work[2]


def test_metrics_have_one_colon_and_always_the_loss(base_model: BaseModel) -> None:
    for loss_fn in ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro"):
        outcome, _ = run_one(base_model, make_operation(loss_fn=loss_fn))
        assert isinstance(outcome, ForwardBackwardOutcome)
        assert "loss:sum" in outcome.metrics
        assert all(name.count(":") == 1 and name.split(":")[1] in ("sum", "mean") for name in outcome.metrics)


def test_logits_of_all_tokens_never_exist(base_model: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # given a record of the rows of every softmax over the vocabulary
    rows: list[int] = []
    log_softmax, softmax = torch.log_softmax, torch.softmax

    def recorded(function):  # type: ignore[no-untyped-def]
        def call(logits: torch.Tensor, **options: int) -> torch.Tensor:
            rows.append(logits.shape[0])
            return function(logits, **options)

        return call

    monkeypatch.setattr(torch, "log_softmax", recorded(log_softmax))
    monkeypatch.setattr(torch, "softmax", recorded(softmax))
    # when
    run_one(base_model, make_operation((100, 50)))
    # then
    assert max(rows) == 16
    assert sum(rows) == 2 * 150
