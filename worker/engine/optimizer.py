"""AdamW of one run."""

from __future__ import annotations

import math

import torch
from torch.optim.adamw import adamw

from jobs.operations import Failure, OptimStep, OptimStepOutcome
from worker.engine.run_state import RunState


@torch.no_grad()
def optim_step(state: RunState, params: OptimStep) -> OptimStepOutcome | Failure:
    """One step of AdamW with decoupled weight decay, as `torch.optim.AdamW` takes it; zeroes the gradients.

    A step with nothing accumulated is a step with zero gradients. A step that cannot be taken (gradients or new weights
    that are not finite) changes neither weights nor moments.

    Args:
        state: changed in place.
        params: this step's hyperparameters.

    Returns:
        Metrics `grad_norm` (L2 norm over all gradients, before clipping), `clipped` (1 if clipping scaled them down,
        else 0), `step` (counted from 1) and `learning_rate`; or why the step failed.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101.
    """
    gradients = state.gradients.flat
    norm = torch.linalg.vector_norm(gradients, dtype=torch.float64).item()
    if not math.isfinite(norm):
        state.clear_gradients()
        return Failure(
            f"optim_step: the norm of the accumulated gradients is {norm}; they were cleared and the weights kept. "
            "Look for extreme weights or advantages in the data"
        )
    scale = min(1.0, params.grad_clip_norm / (norm + 1e-6)) if params.grad_clip_norm > 0 else 1.0
    weights, exp_avg, exp_avg_sq = (
        buffer.clone() for buffer in (state.adapter.flat, state.exp_avg.flat, state.exp_avg_sq.flat)
    )
    adamw(
        [weights],
        [gradients * scale if scale < 1.0 else gradients],
        [exp_avg],
        [exp_avg_sq],
        [],
        [torch.tensor(float(state.step))],
        foreach=False,
        amsgrad=False,
        beta1=params.beta1,
        beta2=params.beta2,
        lr=params.learning_rate,
        weight_decay=params.weight_decay,
        eps=params.eps,
        maximize=False,
    )
    state.clear_gradients()
    if not all(bool(torch.isfinite(buffer).all()) for buffer in (weights, exp_avg, exp_avg_sq)):
        return Failure(
            "optim_step: the step would make weights that are not finite; they were kept and the gradients cleared. "
            "Lower adam_params.learning_rate or raise adam_params.eps"
        )
    state.adapter.flat.copy_(weights)
    state.exp_avg.flat.copy_(exp_avg)
    state.exp_avg_sq.flat.copy_(exp_avg_sq)
    state.step += 1
    metrics = {
        "grad_norm": norm,
        "clipped": float(scale < 1.0),
        "step": float(state.step),
        "learning_rate": params.learning_rate,
    }
    return OptimStepOutcome(metrics)
