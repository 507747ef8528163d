"""Blocks are shared, copied before they are written, and never lost."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from worker.sampler.blocks import BLOCK_TOKENS, BlockPool, BlockTable, block_keys, blocks_for
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


def test_a_published_block_is_found_until_its_place_is_needed_oldest_first() -> None:
    # given two published blocks of two prompts, let go of one after the other, in a pool of three
    pool = BlockPool(3)
    tables = [BlockTable(), BlockTable()]
    for table, key in zip(tables, (b"first", b"second"), strict=True):
        pool.reserve(table, BLOCK_TOKENS)
        pool.publish(table.blocks[0], key)
    for table in tables:
        pool.release(table)
    assert pool.num_free == 3

    # when two blocks are needed, of which one is empty
    pool.reserve(BlockTable(), 2 * BLOCK_TOKENS)

    # then the second is still to be had, and the first is not
    assert not pool.reuse(BlockTable(), b"first")
    again = BlockTable()
    assert pool.reuse(again, b"second")
    assert (again.num_tokens, len(again.blocks), pool.num_free) == (BLOCK_TOKENS, 1, 0)


def test_a_reused_block_takes_the_place_of_the_reserved_one() -> None:
    # given a published block, and a table with room for two
    pool = BlockPool(4)
    filled, table = BlockTable(), BlockTable()
    pool.reserve(filled, BLOCK_TOKENS)
    pool.publish(filled.blocks[0], b"key")
    pool.reserve(table, 2 * BLOCK_TOKENS)

    # when it is reused; then both tables name it, and what was reserved is free
    assert pool.reuse(table, b"key")
    assert table.blocks[0] == filled.blocks[0]
    assert pool.num_holders(filled.blocks[0]) == 2
    assert pool.num_free == 2


def test_keys_say_scope_and_all_tokens_up_to_the_end_of_a_block() -> None:
    # given prompts that differ in scope, in an early token, or in what follows
    tokens = list(range(2 * BLOCK_TOKENS + 5))
    keys = block_keys("a", tokens)

    # when, then
    assert len(keys) == 2
    assert block_keys("a", tokens[: 2 * BLOCK_TOKENS - 1]) == keys[:1]
    assert block_keys("a", [*tokens, 7]) == keys
    assert not set(block_keys("b", tokens)) & set(keys)
    assert not set(block_keys("a", [9, *tokens[1:]])) & set(keys)


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
    def publish(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        for block in table.blocks[: table.num_tokens // BLOCK_TOKENS]:
            self.pool.publish(block, b"%d" % data.draw(st.integers(0, 5)))

    @rule(key=st.integers(0, 5))
    def reuse(self, key: int) -> None:
        table = BlockTable()
        assert self.pool.reuse(table, b"%d" % key) == (len(table.blocks) == 1)
        self.tables.append(table)

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
