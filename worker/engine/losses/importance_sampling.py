"""Policy gradient with importance ratios."""

# M targets

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from worker.engine.losses.loss import LossTerms
from worker.engine.losses.ratio import importance_ratio, sampler_divergence


def importance_sampling(logprobs_M: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> LossTerms:
    """`−Σ ρ·A` with `ρ = exp(ℓ − q)`."""
    del config
    ratio_M = importance_ratio(logprobs_M, inputs)
    return LossTerms(-(ratio_M * inputs["advantages"]), {"sampler_divergence": sampler_divergence(logprobs_M, inputs)})
