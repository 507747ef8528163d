"""Attention of a packed batch, confined to each sequence.

transformers models call `attend_packed` through their registry of attention functions; it hands over to the
`Attention` that came with the pass. No mask is ever built.
"""

# T packed tokens, H query heads, G key-value heads, d head size

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from worker.engine.errors import UnsupportedModelError
from worker.engine.lora import cover

ATTENTION_NAME = "piecework"
_NOT_SUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")


class Attention(Protocol):
    """How the tokens of one pass attend."""

    def attend(self, layer: int, query_HTd: Tensor, key_GTd: Tensor, value_GTd: Tensor, scale: float) -> Tensor:
        """Attend causally within each sequence.

        Args:
            layer: index of the decoder layer.
            query_HTd, key_GTd, value_GTd: of all T tokens of the pass, rotated.
            scale: factor of the scores.

        Returns:
            `[T, H, d]`.
        """
        ...


class PackedAttention:
    """Whole sequences side by side, as in training; rows outside every sequence get zeros."""

    def __init__(self, sequences: Sequence[tuple[int, int]], num_rows: int) -> None:
        """Make it for one pass.

        Args:
            sequences: `[start, stop)` of each, in order, not overlapping.
            num_rows: T.
        """
        self._spans = cover(sequences, num_rows)
        self._sequences = frozenset(sequences)

    def attend(self, layer: int, query_HTd: Tensor, key_GTd: Tensor, value_GTd: Tensor, scale: float) -> Tensor:
        """One causal product per sequence, whose bits depend on that sequence alone."""
        del layer
        sizes = [stop - start for start, stop in self._spans]
        parts = []
        for span, query, key, value in zip(
            self._spans,
            torch.split(query_HTd, sizes, dim=1),
            torch.split(key_GTd, sizes, dim=1),
            torch.split(value_GTd, sizes, dim=1),
            strict=True,
        ):
            if span in self._sequences:
                parts.append(_causal(query, key, value, scale))
            else:
                parts.append(torch.zeros_like(query).transpose(0, 1))
        return torch.cat(parts)


def _causal(query_HNd: Tensor, key_GNd: Tensor, value_GNd: Tensor, scale: float) -> Tensor:
    attended_1HNd = nn.functional.scaled_dot_product_attention(
        query_HNd[None],
        key_GNd[None],
        value_GNd[None],
        is_causal=True,
        scale=scale,
        enable_gqa=query_HNd.shape[0] != key_GNd.shape[0],
    )
    return attended_1HNd[0].transpose(0, 1)


class TruncatedAttention:
    """Another attention, for a pass whose last rows are padding that it knows nothing of."""

    def __init__(self, attention: Attention, num_rows: int) -> None:
        self._attention = attention
        self._num_rows = num_rows

    def attend(self, layer: int, query_HTd: Tensor, key_GTd: Tensor, value_GTd: Tensor, scale: float) -> Tensor:
        """The first rows attend; the others get zeros."""
        n = self._num_rows
        attended = self._attention.attend(layer, query_HTd[:, :n], key_GTd[:, :n], value_GTd[:, :n], scale)
        missing = query_HTd.shape[1] - n
        return torch.cat([attended, attended.new_zeros(missing, *attended.shape[1:])])


def attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    attention: Attention,
    **features: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers; batch dimension 1.

    Raises:
        UnsupportedModelError: the layer wants something that is not plain causal attention.
    """
    wanted = [name for name in _NOT_SUPPORTED if features.get(name) is not None]
    if wanted or attention_mask is not None or getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError(
            f"{type(module).__name__} needs {wanted or 'a mask of its own'}; only plain causal attention is supported"
        )
    layer: int = module.layer_idx  # type: ignore[assignment]
    return attention.attend(layer, query[0], key[0], value[0], scaling)[None], None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, attend_packed)
