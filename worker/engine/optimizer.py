"""AdamW of one run."""

from __future__ import annotations

import math

import torch
from torch import Tensor
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
    buffers = (state.adapter.flat, state.exp_avg.flat, state.exp_avg_sq.flat)
    stepped = _stepped(buffers, gradients * scale if scale < 1.0 else gradients, state.step, params)
    state.clear_gradients()
    if stepped is None:
        return Failure(
            "optim_step: the step would make weights that are not finite; they were kept and the gradients cleared. "
            "Lower adam_params.learning_rate or raise adam_params.eps"
        )
    for buffer, new in zip(buffers, stepped, strict=True):
        buffer.copy_(new)
    state.step += 1
    metrics = {
        "grad_norm": norm,
        "clipped": float(scale < 1.0),
        "step": float(state.step),
        "learning_rate": params.learning_rate,
    }
    return OptimStepOutcome(metrics)


def _stepped(
    buffers: tuple[Tensor, Tensor, Tensor], gradients: Tensor, step: int, params: OptimStep
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Weights and both moments after the step, as new tensors; None if one of them would not be finite."""
    # torch refuses factors beyond fp32 with an error of its own
    largest = max(params.learning_rate / (1 - params.beta1), params.learning_rate * params.weight_decay, params.eps)
    if largest > torch.finfo(torch.float32).max:
        return None
    weights, exp_avg, exp_avg_sq = (buffer.clone() for buffer in buffers)
    adamw(
        [weights],
        [gradients],
        [exp_avg],
        [exp_avg_sq],
        [],
        [torch.tensor(float(step))],
        foreach=False,
        amsgrad=False,
        beta1=params.beta1,
        beta2=params.beta2,
        lr=params.learning_rate,
        weight_decay=params.weight_decay,
        eps=params.eps,
        maximize=False,
    )
    finite = all(bool(torch.isfinite(buffer).all()) for buffer in (weights, exp_avg, exp_avg_sq))
    return (weights, exp_avg, exp_avg_sq) if finite else None
