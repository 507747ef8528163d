"""Cosines and sines of positions, from a table on CPU.

Elementwise kernels on CPU may give a number other bits where it lies at the end of a thread's share. The table is
computed in blocks of fixed length, so that a position's numbers are the same in every pass.
"""

# T packed tokens, d head size

from __future__ import annotations

import torch
from torch import Tensor, nn

BLOCK = 1024


class RotaryTable(nn.Module):
    """A model's own rotary embedding, evaluated once per position."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self._rotary = rotary
        self._tables: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[1, T, d]` in the dtype of `hidden`."""
        length = int(position_ids.max()) + 1
        cos, sin = self._tables.get(hidden.dtype, (hidden.new_empty(0, 0), hidden.new_empty(0, 0)))
        if cos.shape[0] < length:
            cos, sin = self._tables[hidden.dtype] = self._grow(hidden, cos, sin, length)
        return cos[position_ids], sin[position_ids]

    @torch.no_grad()
    def _grow(self, hidden: Tensor, cos: Tensor, sin: Tensor, length: int) -> tuple[Tensor, Tensor]:
        cosines, sines = ([cos], [sin]) if cos.shape[0] else ([], [])
        for start in range(cos.shape[0], length, BLOCK):
            positions = torch.arange(start, start + BLOCK, device=hidden.device)[None]
            more_cos, more_sin = self._rotary(hidden, positions)
            cosines.append(more_cos[0])
            sines.append(more_sin[0])
        return torch.cat(cosines), torch.cat(sines)
