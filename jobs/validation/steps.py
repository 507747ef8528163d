"""Hyperparameters of an optimizer step."""

from __future__ import annotations

from jobs.operations import OptimStep
from jobs.validation.numbers import check_fraction, check_non_negative


def check_optim_step(body: OptimStep) -> None:
    """Refuse hyperparameters with which AdamW is not defined."""
    check_non_negative(body.learning_rate, "adam_params.learning_rate")
    check_fraction(body.beta1, "adam_params.beta1")
    check_fraction(body.beta2, "adam_params.beta2")
    check_non_negative(body.eps, "adam_params.eps")
    check_non_negative(body.weight_decay, "adam_params.weight_decay")
    check_non_negative(body.grad_clip_norm, "adam_params.grad_clip_norm")
