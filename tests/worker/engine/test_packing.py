from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.worker.engine.factories import make_datum
from worker.engine.lora import cover
from worker.engine.packing import ROWS, gather_targets, group, pack, split

CPU = torch.device("cpu")


def test_operation_is_cut_between_datums_by_itself_alone() -> None:
    datums = [make_datum(length) for length in (30, 30, 5, 100, 64)]
    chunks = split(0, datums, tokens_max=64)
    assert [(chunk.first, len(chunk.datums)) for chunk in chunks] == [(0, 2), (2, 1), (3, 1), (4, 1)]


def test_passes_hold_chunks_in_order_up_to_the_limit() -> None:
    chunks = [chunk for i in range(5) for chunk in split(i, [make_datum(30)], tokens_max=64)]
    assert [[chunk.operation for chunk in together] for together in group(chunks, tokens_max=64)] == [
        [0, 1],
        [2, 3],
        [4],
    ]


def test_positions_restart_and_segments_are_aligned() -> None:
    # given
    chunks = [*split(0, [make_datum(3), make_datum(4)], tokens_max=64), *split(1, [make_datum(20)], tokens_max=64)]
    # when
    batch = pack(chunks, CPU)
    # then
    assert batch.spans == ((0, 7), (16, 36))
    assert batch.sequences == ((0, 3), (3, 7), (16, 36))
    assert batch.positions[:7].tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert batch.num_rows == 48
    assert all(start % ROWS == 0 for start, _ in batch.spans)


def test_targets_of_different_widths_come_back_in_their_shapes() -> None:
    # given
    datums = [make_datum(3, targets=2), make_datum(4), make_datum(2, targets=5)]
    (chunk,) = split(0, datums, tokens_max=64)
    # when
    targets = gather_targets(chunk, {}, CPU)
    flat = targets.flatten(targets.token_ids)
    # then
    for datum, back in zip(datums, targets.unflatten(flat.numpy()), strict=True):
        np.testing.assert_array_equal(back, datum.inputs["target_tokens"])
    assert [targets.datum_of(i) for i in (0, 5, 6, 9, 10, 19)] == [0, 0, 1, 1, 2, 2]


def test_spans_and_gaps_cover_all_rows() -> None:
    assert cover([(0, 3), (5, 8)], 10) == ((0, 3), (3, 5), (5, 8), (8, 10))
    with pytest.raises(ValueError, match="overlaps"):
        cover([(0, 3), (2, 8)], 10)
