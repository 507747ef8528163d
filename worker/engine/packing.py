"""Datums of many runs side by side in one pass, without padding between them.

An operation is first cut into chunks of whole datums by a rule that looks at nothing else; chunks of different
operations are then put into passes. A chunk is one segment of its pass, so its bits do not depend on the others.
"""

# T packed tokens, N rows of one chunk, K targets per row, M targets

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from jobs.operations import Array, Datum

ROWS = 16
"""In deterministic mode segments start at multiples of this many rows: fewer than 16 rows lie between them, and all
start as aligned in memory as the first, on which kernels may depend."""


@dataclass(frozen=True, eq=False)
class Chunk:
    """Consecutive datums of one operation that go through one pass.

    Attributes:
        operation: index of the operation among those handed in.
        first: index of the first datum within the operation.
        datums: at least one.
        align: its rows in a pass are its tokens, rounded up to a multiple of this.
    """

    operation: int
    first: int
    datums: tuple[Datum, ...]
    align: int = ROWS

    @property
    def num_tokens(self) -> int:
        """Tokens of all datums together."""
        return sum(len(datum.tokens) for datum in self.datums)

    @property
    def num_rows(self) -> int:
        """Rows it takes in a pass."""
        return -(-self.num_tokens // self.align) * self.align


def split(operation: int, datums: Sequence[Datum], *, tokens_max: int, align: int = ROWS) -> list[Chunk]:
    """Cut an operation into chunks of at most `tokens_max` tokens; a longer datum is a chunk of its own."""
    chunks: list[Chunk] = []
    first, tokens = 0, 0
    for index, datum in enumerate(datums):
        if index > first and tokens + len(datum.tokens) > tokens_max:
            chunks.append(Chunk(operation, first, tuple(datums[first:index]), align))
            first, tokens = index, 0
        tokens += len(datum.tokens)
    chunks.append(Chunk(operation, first, tuple(datums[first:]), align))
    return chunks


def group(chunks: Sequence[Chunk], *, tokens_max: int) -> list[list[Chunk]]:
    """Put chunks into passes of at most `tokens_max` rows, in order; a larger chunk goes alone."""
    passes: list[list[Chunk]] = []
    rows = 0
    for chunk in chunks:
        if not passes or rows + chunk.num_rows > tokens_max:
            passes.append([])
            rows = 0
        passes[-1].append(chunk)
        rows += chunk.num_rows
    return passes


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One pass.

    Attributes:
        tokens, positions: int64 `[T]`; positions restart with each datum.
        spans: `[start, stop)` of each chunk, in the order given; starts are multiples of `Chunk.align`.
        sequences: `[start, stop)` of each datum.
    """

    tokens: Tensor
    positions: Tensor
    spans: tuple[tuple[int, int], ...]
    sequences: tuple[tuple[int, int], ...]

    @property
    def num_rows(self) -> int:
        """T."""
        return self.tokens.shape[0]


def pack(chunks: Sequence[Chunk], device: torch.device) -> PackedBatch:
    """Concatenate the datums of all chunks.

    Source: Krell et al. 2021, arXiv:2107.02027.
    """
    num_rows = sum(chunk.num_rows for chunk in chunks)
    tokens_T = np.zeros(num_rows, dtype=np.int64)
    positions_T = np.zeros(num_rows, dtype=np.int64)
    spans, sequences = [], []
    start = 0
    for chunk in chunks:
        spans.append((start, start + chunk.num_tokens))
        place = start
        for datum in chunk.datums:
            stop = place + len(datum.tokens)
            tokens_T[place:stop] = datum.tokens
            positions_T[place:stop] = np.arange(stop - place)
            sequences.append((place, stop))
            place = stop
        start += chunk.num_rows
    return PackedBatch(
        torch.from_numpy(tokens_T).to(device),
        torch.from_numpy(positions_T).to(device),
        tuple(spans),
        tuple(sequences),
    )


@dataclass(frozen=True, eq=False)
class Targets:
    """The targets of a chunk, and the loss's other inputs, one number per target.

    Attributes:
        token_ids: int64 `[N, K]`, K the most that any datum has; 0 where a datum has fewer.
        counted: bool `[N, K]`, which of them are targets; None if all are.
        inputs: by name, `[M]`, datum after datum, row after row.
        shapes: of `target_tokens` of each datum.
    """

    token_ids: Tensor
    counted: Tensor | None
    inputs: dict[str, Tensor]
    shapes: tuple[tuple[int, ...], ...]

    def flatten(self, values_NK: Tensor) -> Tensor:
        """`[N, K]` → `[M]`."""
        return values_NK.reshape(-1) if self.counted is None else values_NK[self.counted]

    def unflatten(self, values_M: Array) -> list[Array]:
        """`[M]` → one array per datum, shaped as its targets."""
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        parts = np.split(values_M, np.cumsum(sizes)[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def datum_of(self, index: int) -> int:
        """Which datum of the chunk the target at `index` of `[M]` belongs to."""
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes])
        return int(np.searchsorted(ends, index, side="right"))


def gather_targets(chunk: Chunk, defaults: Mapping[str, float], device: torch.device) -> Targets:
    """Targets and inputs of all datums of a chunk.

    Args:
        chunk: whose datums are well-formed.
        defaults: what stands in for an optional input that one datum has and another lacks.
        device: where the tensors go.
    """
    shapes = tuple(tuple(datum.inputs["target_tokens"].shape) for datum in chunk.datums)
    widths = [shape[1] if len(shape) == 2 else 1 for shape in shapes]
    token_ids = np.zeros((chunk.num_tokens, max(widths)), dtype=np.int64)
    counted = np.zeros(token_ids.shape, dtype=np.bool_)
    start = 0
    for datum, width in zip(chunk.datums, widths, strict=True):
        stop = start + len(datum.tokens)
        token_ids[start:stop, :width] = datum.inputs["target_tokens"].reshape(-1, width)
        counted[start:stop, :width] = True
        start = stop
    inputs = {
        name: torch.from_numpy(np.concatenate([_flat(datum, name, defaults) for datum in chunk.datums])).to(device)
        for name in sorted({name for datum in chunk.datums for name in datum.inputs} - {"target_tokens"})
    }
    return Targets(
        torch.from_numpy(token_ids).to(device),
        None if counted.all() else torch.from_numpy(counted).to(device),
        inputs,
        shapes,
    )


def _flat(datum: Datum, name: str, defaults: Mapping[str, float]) -> Array:
    if name in datum.inputs:
        return datum.inputs[name].reshape(-1).astype(np.float32)
    return np.full(datum.inputs["target_tokens"].size, defaults[name], dtype=np.float32)
