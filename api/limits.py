"""Bodies of requests, read within limits: bytes on the wire, bytes after decompression, bytes of JSON.

What always holds: nothing beyond `limit` plus two short ends of a body is in memory, whatever the client sends.
"""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from dataclasses import dataclass

import zstandard
from fastapi.concurrency import run_in_threadpool

from api.errors import UnsupportedEncodingError
from api.wire.address import HEAD_BYTES

DRAIN_FACTOR = 4
"""So many limits of a body that is too large are read and thrown away, so that the client hears the answer."""

ZSTD_WINDOW_BYTES_MAX = 2**27
PROBE_BYTES = 2**20


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
    if encoding == "zstd":
        return await run_in_threadpool(_decompressed, bytes(data), limit)
    return RequestBody(bytes(data), None, b"", b"")


def _refused(head: bytes, tail: bytes, limit: int) -> RequestBody:
    return RequestBody(
        b"", f"the body is over the limit of {limit} bytes; send fewer datums in one request", head, tail
    )


def _decompressed(data: bytes, limit: int) -> RequestBody:
    head = _beginning(data, "zstd")
    try:
        if _expands_beyond(data, limit):
            return _refused(head, b"", limit)
        decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES_MAX).decompressobj()
        whole = decompressor.decompress(data)
    except zstandard.ZstdError as error:
        return RequestBody(b"", f"the body is not zstd: {error}", head, b"")
    if not decompressor.eof or decompressor.unused_data:
        return RequestBody(b"", "the body is not one whole zstd frame; it was cut off or continued", head, b"")
    return RequestBody(whole, None, b"", b"")


def _expands_beyond(data: bytes, limit: int) -> bool:
    """Whether there would be more than `limit` bytes; finds out without holding them."""
    left = limit + 1
    with zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES_MAX).stream_reader(io.BytesIO(data)) as reader:
        while left > 0:
            part = reader.read(min(left, PROBE_BYTES))
            if not part:
                return False
            left -= len(part)
    return True


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
