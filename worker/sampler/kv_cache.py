"""Keys and values of every token that may still be attended to, in blocks, for all layers.

What always holds: a block is cleared when it is handed out, so what its last holder left (a NaN, say) reaches nobody.
"""

# L layers, B blocks, S tokens of a block, G key-value heads, d head size, N tokens, M tables of n blocks each

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from worker.sampler.blocks import BLOCK_TOKENS, Reserved


class KVCache:
    """The tensors behind the block tables. Memory is touched only as blocks are used (on CPU)."""

    def __init__(self, config: Any, *, num_blocks: int, device: torch.device, dtype: torch.dtype) -> None:
        """Set memory aside.

        Args:
            config: the transformers config of the base model.
            num_blocks: of `BLOCK_TOKENS` tokens each.
            device, dtype: those of the base model.
        """
        num_heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        head_size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.num_blocks = num_blocks
        self.scratch_slot = num_blocks * BLOCK_TOKENS
        """Where rows of padding are written; never read."""
        shape = (int(config.num_hidden_layers), 2, num_blocks + 1, BLOCK_TOKENS, num_heads, head_size)
        self._data_L2BSGd = torch.empty(shape, device=device, dtype=dtype)

    @property
    def device(self) -> torch.device:
        """Where keys and values lie."""
        return self._data_L2BSGd.device

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self._data_L2BSGd.dtype

    @property
    def block_bytes(self) -> int:
        """Memory of one block over all layers."""
        return self._data_L2BSGd[:, :, 0].numel() * self._data_L2BSGd.element_size()

    def prepare(self, reserved: Reserved) -> None:
        """Clear fresh blocks and copy shared ones, as a reservation asks."""
        if reserved.fresh:
            self._data_L2BSGd.index_fill_(2, torch.tensor(reserved.fresh, device=self.device), 0)
        for source, target in reserved.copies:
            self._data_L2BSGd[:, :, target] = self._data_L2BSGd[:, :, source]

    def write(self, layer: int, slots_N: Tensor, key_NGd: Tensor, value_NGd: Tensor) -> None:
        """Keep the keys and values of N tokens of one layer."""
        for part, new_NGd in zip(self._data_L2BSGd[layer], (key_NGd, value_NGd), strict=True):
            part.view(-1, *part.shape[2:]).index_copy_(0, slots_N, new_NGd)

    def read(self, layer: int, blocks_Mn: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of M tables of equal length, each `[M, G, n·S, d]`."""
        layer_2BSGd = self._data_L2BSGd[layer]
        num_tables, num_blocks = blocks_Mn.shape
        gathered = layer_2BSGd.index_select(1, blocks_Mn.reshape(-1))
        both_2MNGd = gathered.view(2, num_tables, num_blocks * BLOCK_TOKENS, *layer_2BSGd.shape[3:])
        key_MGNd, value_MGNd = both_2MNGd.transpose(2, 3)
        return key_MGNd, value_MGNd
