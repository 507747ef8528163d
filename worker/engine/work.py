"""How much an operation computes, in units that do not depend on the machine: one per token, parameter and pass factor.

Device time of a step is split among its operations in proportion to this.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from worker.engine.adapter import Adapter
from worker.engine.base_model import BaseModel

FORWARD = 2
FORWARD_BACKWARD = 4


def work_units(base_model: BaseModel, adapter: Adapter | None, spans: Iterable[tuple[int, int]], *, factor: int) -> int:
    """Work of running some tokens of some sequences.

    Args:
        base_model: counts with what a token is multiplied with.
        adapter: counts with all its weights (of experts: with the share that a token is routed to).
        spans: `(num_new, num_before)` per sequence: tokens run, and tokens before them that they attend to.
        factor: `FORWARD` or `FORWARD_BACKWARD`, also for tokens sampled.

    Returns:
        `factor · Σ (tokens · parameters + attended pairs · 2 · width of attention)`.
    """
    parameters = base_model.matmul_parameters + (_adapter_parameters(base_model, adapter) if adapter else 0)
    width = _attention_width(base_model.config)
    units = 0
    for num_new, num_before in spans:
        pairs = num_new * num_before + num_new * (num_new + 1) // 2
        units += num_new * parameters + pairs * 2 * width
    return factor * units


def _adapter_parameters(base_model: BaseModel, adapter: Adapter) -> int:
    total = 0
    num_choices = int(getattr(base_model.config, "num_experts_per_tok", 0))
    for site in adapter.layout.sites:
        count = adapter.layout.rank * (site.in_features + site.out_features)
        total += count * (1 if site.num_experts is None else num_choices)
    return total


def _attention_width(config: Any) -> int:
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_hidden_layers * config.num_attention_heads * head_size)
