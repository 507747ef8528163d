"""Who holds which block of the key-value cache, and what idle ones still hold. Numbers only, no tensors.

What always holds: a block is free or has as many holders as tables name it; nothing is allocated twice, and when every
table has been released every block is free. A free block that was published keeps its content until it is needed for
something else, the least recently used first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from worker.sampler.errors import OutOfBlocksError

BLOCK_TOKENS = 32
"""Tokens whose keys and values one block holds."""


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // BLOCK_TOKENS)


def block_keys(scope: str, tokens: Sequence[int]) -> list[bytes]:
    """Names of the contents of a prompt's full blocks: each says all tokens up to the block's end.

    Args:
        scope: what else keys and values depend on, and who may share them.
        tokens: of the prompt.
    """
    digest = hashlib.sha256(scope.encode()).digest()
    keys = []
    for stop in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS):
        block = np.asarray(tokens[stop - BLOCK_TOKENS : stop], dtype=np.int64)
        digest = hashlib.sha256(digest + block.tobytes()).digest()
        keys.append(digest)
    return keys


@dataclass(eq=False)
class BlockTable:
    """Where the keys and values of one run of tokens lie, in order.

    Attributes:
        blocks: ids of blocks; token t lies in `blocks[t // BLOCK_TOKENS]`.
        num_tokens: how many tokens have been computed; the rest of the blocks is reserved.
    """

    blocks: list[int] = field(default_factory=list)
    num_tokens: int = 0

    def slots(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Places in the cache of the tokens `[start, stop)`, counted in tokens over all blocks."""
        positions = np.arange(start, stop, dtype=np.int64)
        blocks = np.asarray(self.blocks, dtype=np.int64)[positions // BLOCK_TOKENS]
        return np.asarray(blocks * BLOCK_TOKENS + positions % BLOCK_TOKENS)


@dataclass
class Reserved:
    """What a reservation asks of the cache's tensors before they are written.

    Attributes:
        fresh: new blocks, to be cleared.
        copies: (from, to), where a shared block is about to be written by one of its holders.
    """

    fresh: list[int] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)


class BlockPool:
    """A fixed number of blocks, reference-counted; published ones can be found by their content."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._holders = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # low ids first, so that little of the cache is touched
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Published and held by nobody, the least recently used first."""
        self._published: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, with or without content."""
        return len(self._free) + len(self._idle)

    def num_holders(self, block: int) -> int:
        """How many tables name this block."""
        return self._holders[block]

    def num_missing(self, table: BlockTable, num_new: int) -> int:
        """Free blocks that `reserve` would take."""
        missing = max(0, blocks_for(table.num_tokens + num_new) - len(table.blocks))
        return missing + (1 if num_new and self._writes_shared(table) else 0)

    def reserve(self, table: BlockTable, num_new: int) -> Reserved:
        """Make room for the next `num_new` tokens of a table; a shared block that they would enter is copied first.

        Args:
            table: is changed, unless this raises.
            num_new: tokens to be written behind `table.num_tokens`.

        Returns:
            What must be done to the cache's tensors.

        Raises:
            OutOfBlocksError: too few blocks are free; nothing has changed.
        """
        wanted = self.num_missing(table, num_new)
        if wanted > self.num_free:
            raise OutOfBlocksError(wanted=wanted, free=self.num_free)
        reserved = Reserved()
        if num_new and self._writes_shared(table):
            last = table.num_tokens // BLOCK_TOKENS
            source, target = table.blocks[last], self._take()
            self._drop(source)
            table.blocks[last] = target
            reserved.copies.append((source, target))
        while len(table.blocks) < blocks_for(table.num_tokens + num_new):
            block = self._take()
            table.blocks.append(block)
            reserved.fresh.append(block)
        return reserved

    def fork(self, table: BlockTable, num_tokens: int) -> BlockTable:
        """A second table over the first `num_tokens` tokens of `table`, sharing its blocks."""
        shared = table.blocks[: blocks_for(num_tokens)]
        for block in shared:
            self._holders[block] += 1
        return BlockTable(list(shared), num_tokens)

    def publish(self, block: int, key: bytes) -> None:
        """Let others find a held block, which is never written again; of equal ones the first stays."""
        if self._holders[block] and block not in self._keys and key not in self._published:
            self._published[key] = block
            self._keys[block] = key

    def reuse(self, table: BlockTable, key: bytes) -> bool:
        """Make a published block the next one of a table, in place of one that was reserved; False if there is none.

        Args:
            table: `num_tokens` is at the end of a block, and grows by a block.
            key: of what the block must hold.
        """
        block = self._published.get(key)
        if block is None:
            return False
        place = table.num_tokens // BLOCK_TOKENS
        if not self._holders[block]:
            del self._idle[block]
        self._holders[block] += 1
        if place < len(table.blocks):
            self._drop(table.blocks[place])
            table.blocks[place] = block
        else:
            table.blocks.append(block)
        table.num_tokens += BLOCK_TOKENS
        return True

    def release(self, table: BlockTable) -> None:
        """Let go of everything a table names; releasing it again does nothing."""
        for block in reversed(table.blocks):  # what comes first in a prompt is of use the longest
            self._drop(block)
        table.blocks = []
        table.num_tokens = 0

    def _writes_shared(self, table: BlockTable) -> bool:
        """Whether the next token would enter a block that another table names too."""
        next_block = table.num_tokens // BLOCK_TOKENS
        return next_block < len(table.blocks) and self._holders[table.blocks[next_block]] > 1

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._published[self._keys.pop(block)]
        self._holders[block] = 1
        return block

    def _drop(self, block: int) -> None:
        assert self._holders[block] > 0, "a block was released that nobody holds"
        self._holders[block] -= 1
        if self._holders[block] == 0:
            if block in self._keys:
                self._idle[block] = None
            else:
                self._free.append(block)
