"""Random numbers are those of the published generator, and depend on where they are used alone."""

from __future__ import annotations

import numpy as np
import pytest

from worker.sampler.philox import philox, uniforms


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_words_equal_the_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    # given counters and keys of the known answers that Random123 ships (kat_vectors, philox4x32, 10 rounds)
    words = [np.array([word], dtype=np.uint64) for word in (*counter, *key)]

    # when the generator runs
    result = philox((words[0], words[1], words[2], words[3]), (words[4], words[5]))

    # then it gives their words
    assert tuple(int(word[0]) for word in result) == expected


def test_a_number_depends_on_seed_sequence_and_position_alone() -> None:
    # given numbers drawn together, with seeds of any sign and size
    seeds, sequences, positions = [1, 1, 1, -7, 2**80 + 3], [0, 1, 0, 0, 0], [5, 5, 6, 5, 5]
    together = uniforms(seeds, sequences, positions)

    # when each is drawn alone
    alone = [uniforms([s], [q], [p])[0] for s, q, p in zip(seeds, sequences, positions, strict=True)]

    # then it is the same, and no two are equal
    assert together.tolist() == alone
    assert len(set(alone)) == len(alone)


def test_numbers_are_uniform() -> None:
    # given many positions of one sequence
    numbers = uniforms([3] * 20_000, [0] * 20_000, range(20_000))

    # when they are counted in ten equal bins
    counts, _ = np.histogram(numbers, bins=10, range=(0, 1))

    # then chi-square with 9 degrees of freedom stays below its 0.1 % quantile, 27.9
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9
    assert numbers.min() >= 0
    assert numbers.max() < 1
