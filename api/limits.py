"""Bodies of requests, read within limits: bytes on the wire, bytes after decompression, bytes of JSON.

What always holds: nothing beyond `limit` plus two short ends of a body is in memory, whatever the client sends.
"""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from dataclasses import dataclass

import zstandard

from api.errors import UnsupportedEncodingError
from api.wire.address import HEAD_BYTES

DRAIN_FACTOR = 4
"""So many limits of a body that is too large are read and thrown away, so that the client hears the answer."""

ZSTD_WINDOW_BYTES_MAX = 2**27


@dataclass(frozen=True, eq=False)
class RequestBody:
    """A body, or what is left of one that was refused.

    Attributes:
        data: the whole body, decompressed; empty if refused.
        refusal: why it was not kept, or None.
        head, tail: its two ends, in which a training request's address lies.
    """

    data: bytes
    refusal: str | None
    head: bytes
    tail: bytes


async def read(stream: AsyncIterator[bytes], *, encoding: str, limit: int) -> RequestBody:
    """Read a request's body.

    Args:
        stream: its bytes as they arrive.
        encoding: the Content-Encoding header; empty or `zstd`.
        limit: in bytes, for the body as sent and as decompressed.

    Raises:
        UnsupportedEncodingError: another encoding.
    """
    if encoding not in ("", "identity", "zstd"):
        raise UnsupportedEncodingError(f"Content-Encoding {encoding!r} is not read; send zstd or none")
    data, tail, total = bytearray(), b"", 0
    async for chunk in stream:
        total += len(chunk)
        data += chunk[: max(0, limit - len(data))]
        tail = (tail + chunk[-HEAD_BYTES:])[-HEAD_BYTES:]
        if total > DRAIN_FACTOR * limit:
            break
    if total > limit:
        return _refused(_beginning(bytes(data[:HEAD_BYTES]), encoding), tail, limit)
    return RequestBody(bytes(data), None, b"", b"") if encoding != "zstd" else _decompressed(bytes(data), limit)


def _refused(head: bytes, tail: bytes, limit: int) -> RequestBody:
    return RequestBody(
        b"", f"the body is over the limit of {limit} bytes; send fewer datums in one request", head, tail
    )


def _decompressed(data: bytes, limit: int) -> RequestBody:
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES_MAX)
    try:
        with decompressor.stream_reader(io.BytesIO(data), read_across_frames=True) as reader:
            whole = reader.read(limit + 1)
    except zstandard.ZstdError as error:
        return RequestBody(b"", f"the body is not zstd: {error}", _beginning(data, "zstd"), b"")
    if len(whole) > limit:
        return _refused(whole[:HEAD_BYTES], b"", limit)
    return RequestBody(whole, None, b"", b"")


def _beginning(data: bytes, encoding: str) -> bytes:
    """The first decompressed bytes of a body that is cut off or damaged further on."""
    if encoding != "zstd":
        return data[:HEAD_BYTES]
    beginning = bytearray()
    with zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES_MAX).stream_reader(io.BytesIO(data)) as reader:
        try:
            while len(beginning) < HEAD_BYTES:
                part = reader.read1(HEAD_BYTES - len(beginning))
                if not part:
                    break
                beginning += part
        except zstandard.ZstdError:
            pass
    return bytes(beginning)


async def discard(stream: AsyncIterator[bytes], *, limit: int) -> None:
    """Read a body and keep nothing of it."""
    total = 0
    async for chunk in stream:
        total += len(chunk)
        if total > limit:
            break
