"""Blocks are shared, copied before they are written, and never lost."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from worker.sampler.blocks import BLOCK_TOKENS, BlockPool, BlockTable, blocks_for
from worker.sampler.errors import OutOfBlocksError


def test_a_table_names_a_slot_for_each_token() -> None:
    # given a table over more than one block, not in order
    table = BlockTable([7, 2], BLOCK_TOKENS + 3)

    # when its last tokens are looked up
    slots = table.slots(BLOCK_TOKENS - 1, BLOCK_TOKENS + 2)

    # then they lie at the end of the first and at the start of the second
    assert slots.tolist() == [7 * BLOCK_TOKENS + BLOCK_TOKENS - 1, 2 * BLOCK_TOKENS, 2 * BLOCK_TOKENS + 1]


def test_a_shared_block_is_copied_before_one_of_its_holders_writes() -> None:
    # given a prompt of one and a half blocks, shared by two sequences
    pool = BlockPool(4)
    prompt = BlockTable()
    pool.reserve(prompt, BLOCK_TOKENS + BLOCK_TOKENS // 2)
    prompt.num_tokens = BLOCK_TOKENS + BLOCK_TOKENS // 2
    first, second = pool.fork(prompt, prompt.num_tokens), pool.fork(prompt, prompt.num_tokens)
    pool.release(prompt)
    assert pool.num_free == 2

    # when both go on
    copied, alone = pool.reserve(first, 1), pool.reserve(second, 1)

    # then the full block stays shared, the other is copied once, and the last holder writes in place
    assert first.blocks[0] == second.blocks[0]
    assert copied.copies == [(second.blocks[1], first.blocks[1])]
    assert (alone.copies, alone.fresh) == ([], [])


def test_a_reservation_that_does_not_fit_changes_nothing() -> None:
    # given a pool of two blocks, one taken
    pool = BlockPool(2)
    table = BlockTable()
    pool.reserve(table, 1)

    # when more is wanted than there is
    with pytest.raises(OutOfBlocksError, match=r"2 blocks .* are wanted, 1 are free"):
        pool.reserve(table, 2 * BLOCK_TOKENS + 1)

    # then the table and the pool are as before
    assert (len(table.blocks), pool.num_free) == (1, 1)


def test_a_released_table_may_be_released_again() -> None:
    # given a table
    pool = BlockPool(2)
    table = BlockTable()
    pool.reserve(table, BLOCK_TOKENS)

    # when it is released twice
    pool.release(table)
    pool.release(table)

    # then its block is free once
    assert pool.num_free == 2


class PoolMachine(RuleBasedStateMachine):
    """Any order of reservations, forks and releases."""

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.tables: list[BlockTable] = []

    @rule()
    def begin(self) -> None:
        self.tables.append(BlockTable())

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), num_new=st.integers(0, 3 * BLOCK_TOKENS))
    def grow(self, data: st.DataObject, num_new: int) -> None:
        table = data.draw(st.sampled_from(self.tables))
        missing = self.pool.num_missing(table, num_new)
        free = self.pool.num_free
        if missing > free:
            with pytest.raises(OutOfBlocksError):
                self.pool.reserve(table, num_new)
            return
        reserved = self.pool.reserve(table, num_new)
        assert self.pool.num_free == free - missing == free - len(reserved.fresh) - len(reserved.copies)
        table.num_tokens += num_new

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        free = self.pool.num_free
        self.tables.append(self.pool.fork(table, data.draw(st.integers(0, table.num_tokens))))
        assert self.pool.num_free == free

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @invariant()
    def every_block_is_free_or_has_its_holders(self) -> None:
        named = [block for table in self.tables for block in table.blocks]
        for block in range(self.pool.num_blocks):
            assert self.pool.num_holders(block) == named.count(block)
        assert self.pool.num_free == self.pool.num_blocks - len(set(named))

    @invariant()
    def every_table_has_room_for_its_tokens(self) -> None:
        assert all(len(table.blocks) >= blocks_for(table.num_tokens) for table in self.tables)
        assert all(len(set(table.blocks)) == len(table.blocks) for table in self.tables)

    def teardown(self) -> None:
        for table in self.tables:
            self.pool.release(table)
        assert self.pool.num_free == self.pool.num_blocks


TestPool = PoolMachine.TestCase
