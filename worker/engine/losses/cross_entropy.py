"""Weighted negative log-likelihood."""

# M targets

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from worker.engine.losses.loss import LossTerms


def cross_entropy(logprobs_M: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> LossTerms:
    """`−Σ w·ℓ`; weights are any real numbers, negative too, and ones if absent.

    It is exactly linear in the weights: a client may send `w = −∂L/∂ℓ` to get the gradients of any loss L of its own.
    """
    del config
    weights_M = inputs.get("weights")
    return LossTerms(-logprobs_M if weights_M is None else -(weights_M * logprobs_M))
