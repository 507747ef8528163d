"""What a loss is to the engine: a formula per target, summed over all of them.

A formula sees the targets of some datums of one operation in one row: `ℓ` is the learner's log-probability of each, and
every input has one number per target. Each target's loss depends on that target alone, so that cutting an operation
into several passes changes nothing.
"""

# M targets

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from jobs.losses import LossSpec


@dataclass(frozen=True, eq=False)
class Average:
    """A metric that is averaged over some of the targets.

    Attributes:
        values: `[M]`.
        counted: bool `[M]`, which targets count.
    """

    values: Tensor
    counted: Tensor


@dataclass(frozen=True, eq=False)
class LossTerms:
    """What a formula gives.

    Attributes:
        losses: `[M]`, differentiable in the log-probabilities; the loss is their sum.
        averages: metrics by name.
    """

    losses: Tensor
    averages: Mapping[str, Average] = field(default_factory=dict)


Formula = Callable[[Tensor, Mapping[str, Tensor], Mapping[str, float]], LossTerms]
"""`(logprobs_M, inputs by name, settings by key) → LossTerms`."""


@dataclass(frozen=True)
class Loss:
    """A loss: what it takes, and how it is computed."""

    spec: LossSpec
    formula: Formula

    def terms(self, logprobs_M: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> LossTerms:
        """Evaluate the formula.

        Args:
            logprobs_M: fp32.
            inputs: those of `spec`, each `[M]`; optional ones may be absent.
            config: settings that differ from the defaults of `spec`.
        """
        return self.formula(logprobs_M, inputs, {**self.spec.config, **config})
