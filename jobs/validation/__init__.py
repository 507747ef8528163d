"""Whether an operation makes sense for its base model, decided when it is accepted: pure, no HTTP, no torch.

What always holds: what passes here is well-formed for the engine (dtypes, shapes, token ids, finite numbers), and a
refusal names the field, the offending value or index, and what is allowed.
"""

from __future__ import annotations

from jobs.operations import (
    Body,
    CreateModel,
    ForwardBackward,
    LoadState,
    OptimStep,
    Sample,
    SaveExternal,
    SaveForSampler,
    SaveState,
)
from jobs.validation import checkpoints, losses, models, sampling, steps
from jobs.validation.errors import InvalidOperationError
from jobs.validation.models import ModelFacts

__all__ = ["InvalidOperationError", "ModelFacts", "check"]


def check(body: Body, model: ModelFacts) -> None:
    """Refuse an operation that cannot be executed on `model`.

    Raises:
        InvalidOperationError: says what to change.
    """
    match body:
        case CreateModel():
            models.check_lora(body.lora)
        case ForwardBackward():
            losses.check_forward_backward(body, model)
        case OptimStep():
            steps.check_optim_step(body)
        case SaveState() | SaveForSampler() | SaveExternal():
            checkpoints.check_save(body)
        case LoadState():
            pass  # what it names was looked up when it was accepted
        case Sample():
            sampling.check_sample(body, model)
