from __future__ import annotations

import pytest
import torch

from jobs.operations import Failure, LoraConfig, OptimStep, OptimStepOutcome
from tests.worker.engine.factories import make_state
from tests.worker.engine.models import make_base_model
from worker.engine.optimizer import optim_step
from worker.engine.run_state import RunState


@pytest.fixture
def state() -> RunState:
    return make_state(make_base_model("qwen3"), LoraConfig(rank=2))


def set_gradients(state: RunState, value: float) -> None:
    state.gradients.flat.fill_(value)
    state.num_accumulated = 1


def test_step_equals_torch_optim_adamw_and_consumes_the_gradients(state: RunState) -> None:
    # given
    weights = torch.nn.Parameter(state.adapter.flat.clone())
    optimizer = torch.optim.AdamW([weights], lr=1e-3, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.01)
    for seed in range(3):
        state.gradients.flat.normal_(generator=torch.Generator().manual_seed(seed))
        weights.grad = state.gradients.flat.clone()
        # when
        outcome = optim_step(state, OptimStep(learning_rate=1e-3, weight_decay=0.01))
        optimizer.step()
        # then
        assert isinstance(outcome, OptimStepOutcome)
        torch.testing.assert_close(state.adapter.flat, weights.detach(), rtol=0, atol=1e-7)
        assert not state.gradients.flat.any()


def test_clipping_scales_to_the_global_norm(state: RunState) -> None:
    set_gradients(state, 1.0)
    norm = state.adapter.flat.numel() ** 0.5
    outcome = optim_step(state, OptimStep(learning_rate=0.0, beta1=0.0, grad_clip_norm=1.0))
    assert isinstance(outcome, OptimStepOutcome)
    assert outcome.metrics["grad_norm"] == pytest.approx(norm)
    assert outcome.metrics["clipped"] == 1.0
    assert state.exp_avg.flat.norm().item() == pytest.approx(1.0, rel=1e-4)


def test_step_with_nothing_accumulated_has_zero_gradients(state: RunState) -> None:
    before = state.adapter.flat.clone()
    outcome = optim_step(state, OptimStep(learning_rate=0.5))
    assert isinstance(outcome, OptimStepOutcome)
    assert outcome.metrics["grad_norm"] == 0.0
    assert torch.equal(state.adapter.flat, before)
    assert state.step == 1


@pytest.mark.parametrize(
    ("gradient", "params"),
    [
        (float("nan"), OptimStep()),
        (float("inf"), OptimStep(grad_clip_norm=1.0)),
        (0.0, OptimStep(eps=0.0)),
        (1.0, OptimStep(learning_rate=1e39)),
    ],
    ids=["nan", "inf", "zero-over-zero", "overflow"],
)
def test_a_step_that_cannot_be_taken_clears_gradients_and_changes_nothing_else(
    state: RunState, gradient: float, params: OptimStep
) -> None:
    before = state.adapter.flat.clone()
    set_gradients(state, gradient)
    outcome = optim_step(state, params)
    assert isinstance(outcome, Failure)
    assert torch.equal(state.adapter.flat, before)
    assert not state.exp_avg.flat.any()
    assert not state.gradients.flat.any()
    assert (state.step, state.num_accumulated) == (0, 0)
