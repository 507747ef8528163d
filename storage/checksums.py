"""SHA-256 of what is stored: taken beside, while the bytes are on their way, so that it costs no time of its own."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterable, Sequence
from queue import Queue
from types import TracebackType

INLINE_BYTES = 1 << 18
"""A chunk this small is hashed at once: handing it over would take longer."""
_CHUNKS_AHEAD = 8


def checksum(*pieces: bytes | memoryview) -> str:
    """SHA-256 in hex of the pieces one after the other."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


class RunningChecksum:
    """The checksum of chunks that come one after the other; large ones are hashed in a thread of its own.

    A context manager: leaving it ends the thread, whatever happened.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._chunks: Queue[bytes | memoryview | None] | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RunningChecksum:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def update(self, chunk: bytes | memoryview) -> None:
        """Add a chunk, which must not change any more."""
        if self._thread is None and len(chunk) < INLINE_BYTES:
            self._digest.update(chunk)
            return
        if self._thread is None:
            self._chunks = Queue(_CHUNKS_AHEAD)
            self._thread = threading.Thread(target=self._hash, name="checksum", daemon=True)
            self._thread.start()
        assert self._chunks is not None
        self._chunks.put(chunk)

    def hexdigest(self) -> str:
        """SHA-256 in hex of all chunks."""
        self._end()
        return self._digest.hexdigest()

    def _end(self) -> None:
        if self._thread is not None and self._chunks is not None:
            self._chunks.put(None)
            self._thread.join()
            self._thread = None

    def _hash(self) -> None:
        assert self._chunks is not None
        while (chunk := self._chunks.get()) is not None:
            self._digest.update(chunk)


class PiecesReader(io.RawIOBase):
    """Pieces of memory as one stream, never joined."""

    def __init__(self, pieces: Sequence[bytes | memoryview]) -> None:
        self._pieces = [memoryview(piece).cast("B") for piece in pieces if len(piece)]

    def readable(self) -> bool:
        """It is."""
        return True

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, fewer at the end of a piece; none at the end of the last."""
        if not self._pieces:
            return b""
        first = self._pieces[0]
        taken = len(first) if size < 0 else min(size, len(first))
        chunk = bytes(first[:taken])
        if taken == len(first):
            del self._pieces[0]
        else:
            self._pieces[0] = first[taken:]
        return chunk


def size_of(pieces: Iterable[bytes | memoryview]) -> int:
    """Bytes of all pieces together."""
    return sum(memoryview(piece).nbytes for piece in pieces)
