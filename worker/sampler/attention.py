"""Attention of one sampling step over the paged cache.

Prompts attend one by one; sequences that draw attend together with those whose tables are equally long. In both, a
row's bits depend on its own sequence alone, whatever company it has.
"""

# T packed tokens, H query heads, G key-value heads, R = H / G, d head size, N tokens of a chunk, P tokens before it,
# M sequences with tables of n blocks of S tokens each

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from worker.sampler.blocks import BLOCK_TOKENS, BlockTable, blocks_for
from worker.sampler.kv_cache import KVCache

_QUERY_ROWS = 4
"""Query rows are padded to a multiple of this: odd ones make the bits of a row on CPU depend on the thread it is on."""


@dataclass(frozen=True, eq=False)
class PromptRows:
    """Rows `[start, stop)` of the pass: one prompt's tokens from `table.num_tokens` on."""

    start: int
    stop: int
    table: BlockTable


@dataclass(frozen=True, eq=False)
class _Prefix:
    """What the tokens of a prompt that do not begin it attend to.

    Attributes:
        blocks: int64 `[1, n]`, its table up to the last of them.
        mask: bool `[N, K]`, each token sees those up to itself.
    """

    blocks: Tensor
    mask: Tensor


def _prefix_of(prompt: PromptRows, cache: KVCache) -> _Prefix | None:
    first = prompt.table.num_tokens
    if first == 0:
        return None
    total = first + prompt.stop - prompt.start
    blocks = torch.tensor([prompt.table.blocks[: blocks_for(total)]]).to(cache.device)
    mask_NK = torch.arange(total) <= torch.arange(first, total)[:, None]
    return _Prefix(blocks, mask_NK.to(cache.device))


@dataclass(frozen=True, eq=False)
class DecodeRows:
    """One row each of sequences whose tables have the same number of blocks.

    Attributes:
        rows: int64 `[M]`, where they are in the pass.
        blocks: int64 `[M, n]`, their tables.
        mask: `[M, 1, 1, n·S]`, 0 for tokens up to the row's own, minus infinity behind.
    """

    rows: Tensor
    blocks: Tensor
    mask: Tensor


class PagedAttention:
    """The engine's `Attention` for one step: appends the step's keys and values to the cache, and attends over it."""

    def __init__(
        self, cache: KVCache, slots_T: Tensor, prompts: Sequence[PromptRows], decodes: Sequence[DecodeRows]
    ) -> None:
        """Make it for one pass.

        Args:
            cache: of the base model.
            slots_T: int64, where each row's key and value go.
            prompts, decodes: the rows that attend; the others get zeros.
        """
        self._cache = cache
        self._slots_T = slots_T
        self._prompts = [(prompt, _prefix_of(prompt, cache)) for prompt in prompts]
        self._decodes = decodes

    def attend(self, layer: int, query_HTd: Tensor, key_GTd: Tensor, value_GTd: Tensor, scale: float) -> Tensor:
        """Attend causally within each sequence; `[T, H, d]`."""
        self._cache.write(layer, self._slots_T, key_GTd.transpose(0, 1), value_GTd.transpose(0, 1))
        num_heads, num_rows, head_size = query_HTd.shape
        attended_THd = query_HTd.new_zeros(num_rows, num_heads, head_size)
        for prompt, prefix in self._prompts:
            rows = slice(prompt.start, prompt.stop)
            if prefix is None:
                attended = _causal(query_HTd[:, rows], key_GTd[:, rows], value_GTd[:, rows], scale)
            else:
                attended = self._attend_behind(layer, query_HTd[:, rows], prefix, scale)
            attended_THd[rows] = attended.transpose(0, 1)
        for decode in self._decodes:
            attended_THd[decode.rows] = self._attend_decode(layer, query_HTd[:, decode.rows], decode, scale)
        return attended_THd

    def _attend_behind(self, layer: int, query_HNd: Tensor, prefix: _Prefix, scale: float) -> Tensor:
        key_1GKd, value_1GKd = self._cache.read(layer, prefix.blocks)
        total = prefix.mask.shape[1]
        attended_1HNd = scaled_dot_product_attention(
            query_HNd[None],
            key_1GKd[:, :, :total],
            value_1GKd[:, :, :total],
            attn_mask=prefix.mask,
            scale=scale,
            enable_gqa=query_HNd.shape[0] != key_1GKd.shape[1],
        )
        return attended_1HNd[0]

    def _attend_decode(self, layer: int, query_HMd: Tensor, decode: DecodeRows, scale: float) -> Tensor:
        key_MGNd, value_MGNd = self._cache.read(layer, decode.blocks)
        num_heads, num_sequences, head_size = query_HMd.shape
        num_groups = key_MGNd.shape[1]
        heads = num_heads // num_groups  # the heads that share a key are the rows of one product
        query_MGRd = query_HMd.view(num_groups, heads, num_sequences, head_size).permute(2, 0, 1, 3)
        query_MGRd = pad(query_MGRd, (0, 0, 0, -heads % _QUERY_ROWS))
        attended_MGRd = scaled_dot_product_attention(
            query_MGRd, key_MGNd, value_MGNd, attn_mask=decode.mask, scale=scale
        )
        return attended_MGRd[:, :, :heads].reshape(num_sequences, num_heads, head_size)


def group_decodes(rows: Sequence[int], tables: Sequence[BlockTable], cache: KVCache) -> list[DecodeRows]:
    """Group drawing sequences by the length of their tables.

    Args:
        rows: where each sequence's one token is in the pass.
        tables: of each sequence, with room for that token at `num_tokens`.
        cache: gives device and dtype.
    """
    groups: dict[int, list[int]] = {}
    for place, table in enumerate(tables):
        groups.setdefault(blocks_for(table.num_tokens + 1), []).append(place)
    decodes = []
    for num_blocks, places in groups.items():
        lengths_M = torch.tensor([tables[place].num_tokens + 1 for place in places])
        hidden_MN = torch.arange(num_blocks * BLOCK_TOKENS) >= lengths_M[:, None]
        mask_MN = torch.zeros(hidden_MN.shape, dtype=cache.dtype).masked_fill_(hidden_MN, float("-inf"))
        decodes.append(
            DecodeRows(
                rows=torch.tensor([rows[place] for place in places]).to(cache.device),
                blocks=torch.tensor([tables[place].blocks[:num_blocks] for place in places]).to(cache.device),
                mask=mask_MN[:, None, None].to(cache.device),
            )
        )
    return decodes


def _causal(query_HNd: Tensor, key_GNd: Tensor, value_GNd: Tensor, scale: float) -> Tensor:
    attended_1HNd = scaled_dot_product_attention(
        query_HNd[None],
        key_GNd[None],
        value_GNd[None],
        is_causal=True,
        scale=scale,
        enable_gqa=query_HNd.shape[0] != key_GNd.shape[0],
    )
    return attended_1HNd[0]
