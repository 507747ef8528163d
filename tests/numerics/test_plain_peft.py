"""The engine computes what plain `transformers`, `peft` and `torch.optim.AdamW` compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.operations import ForwardBackward, ForwardBackwardOutcome, LoraConfig, OptimStep, OptimStepOutcome
from tests.numerics import plain_peft
from tests.worker.engine.factories import make_datum, make_operation, make_state, make_trainer, make_weights
from tests.worker.engine.models import ARCHITECTURES, make_base_model, make_model
from worker.engine.optimizer import optim_step
from worker.engine.trainer import TrainRequest

LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro")
SITES = [
    pytest.param({}, id="everywhere"),
    pytest.param({"train_unembed": False, "train_mlp": False}, id="attention"),
    pytest.param({"train_unembed": False, "train_attn": False}, id="mlp"),
    pytest.param({"train_attn": False, "train_mlp": False}, id="unembed"),
]


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Same names, and numbers within 1e-5 of the tensor's largest (or of 1)."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        scale = max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(actual[name], wanted, rtol=0, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")


def outcome_of(report: object, index: int = 0) -> ForwardBackwardOutcome:
    outcome = report.outcomes[index]  # type: ignore[attr-defined]
    assert isinstance(outcome, ForwardBackwardOutcome), outcome
    return outcome


@pytest.mark.parametrize("sites", SITES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_and_gradients_equal_plain_peft(
    architecture: str, tied: bool, sites: dict[str, bool], tmp_path: Path
) -> None:
    # given the same adapter in the engine and in peft
    base_model = make_base_model(architecture, tie_word_embeddings=tied)
    state = make_state(base_model, LoraConfig(rank=4, seed=3, **sites))
    reference = plain_peft.load_peft(make_model(architecture, tie_word_embeddings=tied), state, tmp_path)
    body = make_operation((5, 1, 33))
    # when both run an operation
    outcome = outcome_of(make_trainer(base_model).run([TrainRequest(state, body)]))
    logprobs, loss = plain_peft.run(reference, body)
    # then everything agrees
    for actual, wanted in zip(outcome.logprobs, logprobs, strict=True):
        np.testing.assert_allclose(actual, wanted.numpy(), rtol=0, atol=1e-5)
    assert outcome.metrics["loss:sum"] == pytest.approx(loss, rel=1e-5, abs=1e-5)
    assert_close(state.gradients.to_peft_tensors(), plain_peft.adapter_tensors(reference, gradients=True))


@pytest.mark.parametrize("loss_fn", LOSSES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_loss_equals_its_formula_under_autograd(architecture: str, loss_fn: str, tmp_path: Path) -> None:
    # given
    base_model = make_base_model(architecture)
    state = make_state(base_model)
    reference = plain_peft.load_peft(make_model(architecture), state, tmp_path)
    body = make_operation((9, 20), loss_fn=loss_fn, seed=5)
    # when
    outcome = outcome_of(make_trainer(base_model).run([TrainRequest(state, body)]))
    _, loss = plain_peft.run(reference, body)
    # then
    assert outcome.metrics["loss:sum"] == pytest.approx(loss, rel=1e-5, abs=1e-5)
    assert_close(state.gradients.to_peft_tensors(), plain_peft.adapter_tensors(reference, gradients=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_three_steps_of_adamw_equal_torch_optim(architecture: str, tmp_path: Path) -> None:
    # given
    base_model = make_base_model(architecture)
    state = make_state(base_model)
    trainer = make_trainer(base_model)
    reference = plain_peft.load_peft(make_model(architecture), state, tmp_path)
    parameters = [p for p in reference.parameters() if p.requires_grad]
    params = OptimStep(learning_rate=1e-2, weight_decay=0.1, eps=1e-8, grad_clip_norm=1.0)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(3):
        bodies = [make_operation((6, 14), seed=step), make_operation((11,), seed=10 + step)]
        # when both accumulate two operations, clip and step
        trainer.run([TrainRequest(state, body) for body in bodies])
        outcome = optim_step(state, params)
        for body in bodies:
            plain_peft.run(reference, body)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        # then norm and weights agree
        assert isinstance(outcome, OptimStepOutcome)
        assert outcome.metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert outcome.metrics["step"] == step + 1
        assert_close(state.adapter.to_peft_tensors(), plain_peft.adapter_tensors(reference))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_several_targets_per_position_are_weighted_each(architecture: str, tmp_path: Path) -> None:
    # given datums with one, three and five targets per position, targets repeated among them
    base_model = make_base_model(architecture)
    state = make_state(base_model)
    reference = plain_peft.load_peft(make_model(architecture), state, tmp_path)
    data = [make_datum(6, targets=3), make_datum(4), make_datum(20, targets=5, seed=2)]
    data[0].inputs["target_tokens"][:, 1] = data[0].inputs["target_tokens"][:, 0]
    body = ForwardBackward(tuple(make_weights(datum, seed=i) for i, datum in enumerate(data)), "cross_entropy")
    # when
    outcome = outcome_of(make_trainer(base_model).run([TrainRequest(state, body)]))
    logprobs, loss = plain_peft.run(reference, body)
    # then
    for actual, wanted in zip(outcome.logprobs, logprobs, strict=True):
        assert actual.shape == tuple(wanted.shape)
        np.testing.assert_allclose(actual, wanted.numpy(), rtol=0, atol=1e-5)
    assert outcome.metrics["loss:sum"] == pytest.approx(loss, rel=1e-5, abs=1e-5)
    assert_close(state.gradients.to_peft_tensors(), plain_peft.adapter_tensors(reference, gradients=True))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_downloaded_adapter_gives_the_same_logits_in_peft(architecture: str, tied: bool, tmp_path: Path) -> None:
    # given an adapter that adapts everything
    base_model = make_base_model(architecture, tie_word_embeddings=tied)
    state = make_state(base_model, LoraConfig(rank=3, alpha=32.0))
    reference = plain_peft.load_peft(make_model(architecture, tie_word_embeddings=tied), state, tmp_path)
    datum = make_datum(40, targets=8)
    body = ForwardBackward((datum,), "cross_entropy", forward_only=True)
    # when, then
    outcome = outcome_of(make_trainer(base_model).run([TrainRequest(state, body)]))
    with torch.no_grad():
        wanted = plain_peft.logprobs_of(reference, datum)
        without = plain_peft.logprobs_of(make_model(architecture, tie_word_embeddings=tied), datum)
    np.testing.assert_allclose(outcome.logprobs[0], wanted.numpy(), rtol=0, atol=1e-5)
    assert (wanted - without).abs().max() > 0.01, "the adapter must change something for this test to mean anything"
