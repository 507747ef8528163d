"""The tokens of one step, packed: each adapter's rows side by side, so that it has one segment."""

# T packed tokens

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from worker.engine.adapter import Adapter
from worker.engine.lora import Segment
from worker.sampler import sequence
from worker.sampler.attention import PagedAttention, PromptRows, group_decodes
from worker.sampler.blocks import BLOCK_TOKENS, BlockTable, blocks_for
from worker.sampler.kv_cache import KVCache
from worker.sampler.scheduler import PromptChunk

ROW_TILE = 4
"""On CPU each segment's rows are padded to a multiple of this: for other row counts matrix products take kernels that
give the same row other bits (measured with MKL for fp32; tested in `tests/numerics`)."""

Item = TypeVar("Item")


@dataclass(eq=False)
class StepBatch:
    """Input of one pass.

    Attributes:
        tokens, positions, slots: per row; padding writes to the cache's scratch slot.
        segments: one per adapter.
        chunk_rows: where each prompt chunk begins, by identity of the chunk.
        decode_rows: where each drawing sequence's row is, by identity of the sequence.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    chunk_rows: dict[PromptChunk, int] = field(default_factory=dict)
    decode_rows: dict[sequence.Sequence, int] = field(default_factory=dict)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """tokens_T and positions_T, int64, on the device."""
        return torch.tensor(self.tokens).to(device), torch.tensor(self.positions).to(device)

    def attention(self, cache: KVCache, *, grid: int) -> PagedAttention:
        """How these rows attend over the cache.

        Args:
            cache: of the base model.
            grid: prompt tokens attend together up to each multiple of this; bits depend on it.
        """
        prompts = []
        for chunk, row in self.chunk_rows.items():
            for start in range(chunk.start, chunk.stop, grid):
                stop = min(start + grid, chunk.stop)
                table = BlockTable(chunk.table.blocks[: blocks_for(stop)], start)
                prompts.append(PromptRows(row + start - chunk.start, row + stop - chunk.start, table))
        tables = [drawing.table for drawing in self.decode_rows]
        decodes = group_decodes(list(self.decode_rows.values()), tables, cache)
        return PagedAttention(cache, torch.tensor(self.slots).to(cache.device), prompts, decodes)


def pack_step(
    chunks: Sequence[PromptChunk], decodes: Sequence[sequence.Sequence], *, scratch_slot: int, row_tile: int
) -> StepBatch:
    """Pack the prompts and the drawing sequences of one step.

    Args:
        chunks: prompts' tokens, each with the blocks they go to.
        decodes: sequences whose last token is to be computed; room for it is reserved.
        scratch_slot: where padding goes.
        row_tile: rows of a segment are padded to a multiple of this.
    """
    batch = StepBatch()
    work: list[PromptChunk | sequence.Sequence] = [*decodes, *chunks]
    for adapter, items in by_adapter(work, lambda item: item.request.adapter):
        start = len(batch.tokens)
        for item in items:
            if isinstance(item, PromptChunk):
                _pack_chunk(batch, item)
            else:
                _pack_decode(batch, item)
        missing = -(len(batch.tokens) - start) % row_tile
        batch.tokens += [0] * missing
        batch.positions += [0] * missing
        batch.slots += [scratch_slot] * missing
        batch.segments.append(Segment(start, len(batch.tokens), adapter))
    return batch


def by_adapter(
    items: Iterable[Item], adapter_of: Callable[[Item], Adapter | None]
) -> list[tuple[Adapter | None, list[Item]]]:
    """Items with the same adapter together, in the order in which adapters first appear."""
    groups: dict[int, tuple[Adapter | None, list[Item]]] = {}
    for item in items:
        adapter = adapter_of(item)
        groups.setdefault(id(adapter), (adapter, []))[1].append(item)
    return list(groups.values())


def _pack_chunk(batch: StepBatch, chunk: PromptChunk) -> None:
    batch.chunk_rows[chunk] = len(batch.tokens)
    batch.tokens += chunk.request.prompt[chunk.start : chunk.stop]
    batch.positions += range(chunk.start, chunk.stop)
    batch.slots += chunk.table.slots(chunk.start, chunk.stop).tolist()


def _pack_decode(batch: StepBatch, drawing: sequence.Sequence) -> None:
    position = drawing.table.num_tokens
    batch.decode_rows[drawing] = len(batch.tokens)
    batch.tokens.append(drawing.tokens[-1])
    batch.positions.append(position)
    batch.slots.append(drawing.table.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS)
