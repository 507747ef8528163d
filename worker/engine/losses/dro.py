"""Direct reward optimization: off-policy, with a quadratic penalty."""

# M targets

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from worker.engine.losses.loss import LossTerms
from worker.engine.losses.ratio import sampler_divergence


def dro(logprobs_M: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> LossTerms:
    """`−Σ [ℓ·A − ½·β·(ℓ − q)²]`; the penalty holds at every target, also where the advantage is 0.

    Source: Richemond et al. 2024, arXiv:2405.19107.
    """
    penalty_M = 0.5 * config["beta"] * (logprobs_M - inputs["logprobs"]) ** 2
    losses_M = penalty_M - logprobs_M * inputs["advantages"]
    return LossTerms(losses_M, {"sampler_divergence": sampler_divergence(logprobs_M, inputs)})
