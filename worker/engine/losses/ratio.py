"""The importance ratio that the policy losses share, and what is reported about it."""

# M targets

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from worker.engine.losses.loss import Average


def importance_ratio(logprobs_M: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """`ρ = exp(ℓ − q)`, and 1 where the advantage is 0.

    There the loss and its gradient are 0 whatever ρ is; without the exception a ρ that overflows would make them NaN.
    """
    log_ratio_M = logprobs_M - inputs["logprobs"]
    return torch.exp(log_ratio_M.masked_fill(inputs["advantages"] == 0, 0.0))


def sampler_divergence(logprobs_M: Tensor, inputs: Mapping[str, Tensor]) -> Average:
    """Mean of `q − ℓ` where the advantage is not 0: how far the learner has moved from the sampler."""
    return Average((inputs["logprobs"] - logprobs_M).detach(), inputs["advantages"] != 0)


def thresholds(inputs: Mapping[str, Tensor], config: Mapping[str, float], ratio_M: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper bound of the ratio for every target: the input of that name, or else the setting."""
    low_M, high_M = (
        inputs.get(name, torch.full_like(ratio_M, config[name]))
        for name in ("clip_low_threshold", "clip_high_threshold")
    )
    return low_M, high_M
