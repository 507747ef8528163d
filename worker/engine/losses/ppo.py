"""Clipped policy gradient."""

# M targets

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from worker.engine.losses.loss import Average, LossTerms
from worker.engine.losses.ratio import importance_ratio, sampler_divergence, thresholds


def ppo(logprobs_M: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> LossTerms:
    """`−Σ min(ρ·A, clip(ρ, low, high)·A)`; thresholds bound the ratio itself.

    Source: Schulman et al. 2017, arXiv:1707.06347, equation 7.
    """
    ratio_M, advantages_M = importance_ratio(logprobs_M, inputs), inputs["advantages"]
    clipped_M = torch.clamp(ratio_M, *thresholds(inputs, config, ratio_M))
    objective_M, clipped_objective_M = ratio_M * advantages_M, clipped_M * advantages_M
    averages = {
        "clip_fraction": Average((clipped_objective_M < objective_M).detach().float(), advantages_M != 0),
        "sampler_divergence": sampler_divergence(logprobs_M, inputs),
    }
    return LossTerms(-torch.minimum(objective_M, clipped_objective_M), averages)
