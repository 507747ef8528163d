"""Nothing beyond the limit is kept of a body, and its two ends are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest
import zstandard

from api import limits
from api.errors import UnsupportedEncodingError
from api.wire.address import HEAD_BYTES

LIMIT = 3 * HEAD_BYTES


async def stream(data: bytes, piece: int, taken: list[int]) -> AsyncIterator[bytes]:
    for start in range(0, len(data), piece):
        taken.append(start)
        yield data[start : start + piece]


def read(data: bytes, *, encoding: str = "", piece: int = 1000) -> tuple[limits.RequestBody, int]:
    """The body, and how many bytes of it were taken from the stream."""
    taken: list[int] = []
    body = asyncio.run(limits.read(stream(data, piece, taken), encoding=encoding, limit=LIMIT))
    return body, min(len(data), (taken[-1] if taken else 0) + piece)


@pytest.mark.parametrize("size", [0, 1, LIMIT])
@pytest.mark.parametrize("encoding", ["", "zstd"])
def test_a_body_within_the_limit_is_whole(size: int, encoding: str) -> None:
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    sent = zstandard.ZstdCompressor().compress(data) if encoding else data
    body, _ = read(sent, encoding=encoding)
    assert (body.data, body.refusal) == (data, None)


@pytest.mark.parametrize("piece", [1000, 10 * LIMIT])
def test_of_a_body_over_the_limit_only_the_ends_are_kept(piece: int) -> None:
    data = b"a" * HEAD_BYTES + bytes(LIMIT) + b"z" * HEAD_BYTES
    body, _ = read(data, piece=piece)
    assert body.data == b""
    assert body.refusal is not None
    assert str(LIMIT) in body.refusal
    assert (body.head, body.tail) == (b"a" * HEAD_BYTES, b"z" * HEAD_BYTES)


def test_of_a_body_without_end_only_so_much_is_read() -> None:
    _, taken = read(bytes(100 * LIMIT))
    assert taken <= limits.DRAIN_FACTOR * LIMIT + 1000


def test_a_small_body_that_expands_over_the_limit_is_refused_with_its_beginning() -> None:
    bomb = zstandard.ZstdCompressor().compress(b"head" + bytes(1000 * LIMIT))
    assert len(bomb) < LIMIT
    body, _ = read(bomb, encoding="zstd")
    assert body.refusal is not None
    assert (body.head[:4], len(body.head)) == (b"head", HEAD_BYTES)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-3], lambda data: data + b"more", lambda data: b"not zstd", lambda data: data[:2]]
)
def test_compression_that_is_cut_off_or_damaged_is_refused(damage: Callable[[bytes], bytes]) -> None:
    data = np.random.default_rng(0).bytes(5000)
    body, _ = read(damage(zstandard.ZstdCompressor().compress(data)), encoding="zstd")
    assert body.refusal is not None
    assert body.data == b""


def test_other_encodings_are_415() -> None:
    with pytest.raises(UnsupportedEncodingError, match="gzip"):
        read(b"", encoding="gzip")
