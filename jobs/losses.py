"""What each loss takes: its inputs and its settings, without the formula.

The api checks requests against this; `worker/engine/losses` implements exactly these. Every loss is a sum over tokens
and datums, never an average.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

NO_FLOATS: Mapping[str, float] = MappingProxyType({})
NO_INPUTS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class LossSpec:
    """Inputs and settings of one loss.

    Attributes:
        name: `loss_fn` on the wire.
        required_inputs: dtype by name of what every datum must have.
        optional_inputs: dtype by name of what a datum may have.
        config: default by key of every setting, all finite numbers.
        multi_target: whether a position may have several targets (`[N, K]`).
    """

    name: str
    required_inputs: Mapping[str, str]
    optional_inputs: Mapping[str, str] = field(default_factory=lambda: NO_INPUTS)
    config: Mapping[str, float] = field(default_factory=lambda: NO_FLOATS)
    multi_target: bool = False


_POLICY_INPUTS: Mapping[str, str] = MappingProxyType(
    {"target_tokens": "int64", "logprobs": "float32", "advantages": "float32"}
)
_THRESHOLDS: Mapping[str, str] = MappingProxyType({"clip_low_threshold": "float32", "clip_high_threshold": "float32"})

_SPECS = (
    LossSpec(
        name="cross_entropy",
        required_inputs=MappingProxyType({"target_tokens": "int64"}),
        # absent weights are ones
        optional_inputs=MappingProxyType({"weights": "float32"}),
        multi_target=True,
    ),
    LossSpec(name="importance_sampling", required_inputs=_POLICY_INPUTS),
    LossSpec(
        name="ppo",
        required_inputs=_POLICY_INPUTS,
        # per token, instead of the setting of the same name
        optional_inputs=_THRESHOLDS,
        config=MappingProxyType({"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
    ),
    LossSpec(
        name="cispo",
        required_inputs=_POLICY_INPUTS,
        optional_inputs=_THRESHOLDS,
        config=MappingProxyType({"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}),
    ),
    LossSpec(name="dro", required_inputs=_POLICY_INPUTS, config=MappingProxyType({"beta": 0.05})),
)

LOSS_SPECS: Mapping[str, LossSpec] = MappingProxyType({spec.name: spec for spec in _SPECS})
"""Every loss on offer, by name."""
