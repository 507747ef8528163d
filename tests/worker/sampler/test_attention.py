"""Attention over the paged cache equals attention over the whole sequence."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from worker.sampler.attention import PagedAttention, PromptRows, group_decodes
from worker.sampler.blocks import BLOCK_TOKENS, BlockPool, BlockTable
from worker.sampler.kv_cache import KVCache

HEADS, HEAD_SIZE, SCALE = 6, 8, 0.3


def make_cache(num_blocks: int, num_groups: int) -> KVCache:
    """Two layers, filled with NaN, as memory that was never used may be."""
    config = SimpleNamespace(
        num_hidden_layers=2, num_attention_heads=HEADS, num_key_value_heads=num_groups, head_dim=HEAD_SIZE
    )
    cache = KVCache(config, num_blocks=num_blocks, device=torch.device("cpu"), dtype=torch.float32)
    cache._data_L2BSGd.fill_(float("nan"))
    return cache


def whole(query_HTd: Tensor, key_GTd: Tensor, value_GTd: Tensor) -> Tensor:
    """Causal attention over a sequence that lies in one piece, `[T, H, d]`."""
    repeats = HEADS // key_GTd.shape[0]
    key_HTd, value_HTd = key_GTd.repeat_interleave(repeats, 0), value_GTd.repeat_interleave(repeats, 0)
    return scaled_dot_product_attention(query_HTd, key_HTd, value_HTd, is_causal=True, scale=SCALE).transpose(0, 1)


@pytest.mark.parametrize("num_groups", [1, 2, 3, 6])
@pytest.mark.parametrize("lengths", [(1,), (3, 40), (31, 32, 33, 5, 5)])
def test_prompts_and_drawn_tokens_attend_as_in_one_piece(num_groups: int, lengths: tuple[int, ...]) -> None:
    # given sequences of which the prompt is computed in two chunks and then three tokens follow one by one
    cache = make_cache(16, num_groups)
    pool = BlockPool(16)
    torch.manual_seed(0)
    inputs = [
        [torch.randn(heads, length + 3, HEAD_SIZE) for heads in (HEADS, num_groups, num_groups)] for length in lengths
    ]
    tables = [BlockTable() for _ in lengths]
    rounds = [[(0, (length + 1) // 2) for length in lengths], [((length + 1) // 2, length) for length in lengths]]
    rounds += [[(length + more, length + more + 1) for length in lengths] for more in range(3)]
    got: list[list[Tensor]] = [[] for _ in lengths]

    # when each round attends in one pass, with one row of padding in front
    for number, spans in enumerate(rounds):
        slots, parts, starts, row = [cache.scratch_slot], [], [], 1
        for (start, stop), table in zip(spans, tables, strict=True):
            cache.prepare(pool.reserve(table, stop - start))
            slots += table.slots(start, stop).tolist()
            starts.append(row)
            row += stop - start
        for kind in range(3):
            rows = [part[kind][:, a:b] for part, (a, b) in zip(inputs, spans, strict=True)]
            parts.append(torch.cat([torch.zeros_like(inputs[0][kind][:, :1]), *rows], 1))
        prompts = [
            PromptRows(start, start + b - a, BlockTable(list(table.blocks), a))
            for start, (a, b), table in zip(starts, spans, tables, strict=True)
        ]
        decodes = group_decodes(starts, tables, cache) if number >= 2 else []
        attention = PagedAttention(cache, torch.tensor(slots), [] if number >= 2 else prompts, decodes)
        attended = attention.attend(1, parts[0], parts[1], parts[2], SCALE)
        for place, (start, (a, b)) in enumerate(zip(starts, spans, strict=True)):
            got[place].append(attended[start : start + b - a])
            tables[place].num_tokens = b
        assert not attended[0].any()

    # then it is what the sequence gives in one piece
    for (query, key, value), pieces in zip(inputs, got, strict=True):
        torch.testing.assert_close(torch.cat(pieces), whole(query, key, value), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("heads_per_group", "head_size"), [(1, 24), (2, 64), (3, 64), (7, 64), (5, 20)])
@pytest.mark.parametrize("num_blocks", [1, 3, 17])
def test_a_drawn_token_attends_alike_alone_and_in_company(
    heads_per_group: int, head_size: int, num_blocks: int
) -> None:
    # given nine sequences with equally long tables
    num_groups, num_sequences = 2, 9
    config = SimpleNamespace(
        num_hidden_layers=1,
        num_attention_heads=num_groups * heads_per_group,
        num_key_value_heads=num_groups,
        head_dim=head_size,
    )
    cache = KVCache(config, num_blocks=num_sequences * num_blocks, device=torch.device("cpu"), dtype=torch.float32)
    torch.manual_seed(0)
    cache._data_L2BSGd.normal_()
    tables = [
        BlockTable(
            [place + num_sequences * block for block in range(num_blocks)], num_blocks * BLOCK_TOKENS - 1 - place
        )
        for place in range(num_sequences)
    ]
    query_HTd = torch.randn(num_groups * heads_per_group, num_sequences, head_size)
    new_GTd = torch.randn(num_groups, num_sequences, head_size)

    def attend(places: list[int]) -> Tensor:
        slots = [tables[place].slots(tables[place].num_tokens, tables[place].num_tokens + 1)[0] for place in places]
        decodes = group_decodes(range(len(places)), [tables[place] for place in places], cache)
        attention = PagedAttention(cache, torch.tensor(slots), [], decodes)
        return attention.attend(0, query_HTd[:, places], new_GTd[:, places], new_GTd[:, places], SCALE)

    # when they attend together, in parts, and alone
    together = attend(list(range(num_sequences)))

    # then every number is the same
    for places in ([0], [8], [3, 1], [2, 5, 7], [8, 7, 6, 5, 4]):
        assert torch.equal(attend(places), together[places])
