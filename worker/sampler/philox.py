"""Random numbers that depend on nothing but (seed, sequence, position).

A counter-based generator: the same three numbers give the same uniform in any process, on any device, in any order,
so a sample that is drawn again after a crash or beside other requests gets the same tokens.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox-4x32 with ten rounds).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10

Words = npt.NDArray[np.uint64]


def uniforms(seeds: Sequence[int], sequences: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.float64]:
    """One uniform in [0, 1) for each (seed, sequence, position), with 53 random bits.

    Args:
        seeds: any integers; taken modulo 2^64.
        sequences: index of the continuation within its request.
        positions: of the token within its sequence, prompt included.

    Returns:
        float64 `[N]`.
    """
    key = np.array([seed & (2**64 - 1) for seed in seeds], dtype=np.uint64)
    where = np.array(positions, dtype=np.uint64)
    which = np.array(sequences, dtype=np.uint64)
    counter = (where & _LOW, where >> _SHIFT, which & _LOW, which >> _SHIFT)
    first, second, _, _ = philox(counter, (key & _LOW, key >> _SHIFT))
    bits = (first << _SHIFT | second) >> np.uint64(11)
    return np.asarray(bits.astype(np.float64) * 2.0**-53)


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> tuple[Words, Words, Words, Words]:
    """Ten rounds of Philox-4x32 on arrays of 32-bit words held in uint64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3
