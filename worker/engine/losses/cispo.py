"""Policy gradient weighted by clipped importance ratios."""

# M targets

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from worker.engine.losses.loss import Average, LossTerms
from worker.engine.losses.ratio import importance_ratio, sampler_divergence, thresholds


def cispo(logprobs_M: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> LossTerms:
    """`−Σ sg(clip(ρ, low, high))·ℓ·A`, sg stopping the gradient; thresholds bound the ratio itself.

    Source: MiniMax-M1, arXiv:2506.13585, equation 4.
    """
    ratio_M, advantages_M = importance_ratio(logprobs_M, inputs).detach(), inputs["advantages"]
    clipped_M = torch.clamp(ratio_M, *thresholds(inputs, config, ratio_M))
    averages = {
        "clip_fraction": Average((clipped_M != ratio_M).float(), advantages_M != 0),
        "sampler_divergence": sampler_divergence(logprobs_M, inputs),
    }
    return LossTerms(-(clipped_M * logprobs_M * advantages_M), averages)
