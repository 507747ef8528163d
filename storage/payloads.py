"""Bytes of payloads and outcomes: inline in the row when small, else an object that the row names (claim check).

Objects are put with a checksum and verified when they are read: damage is found before anything is computed on it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, cast

from sqlalchemy import Connection

from storage import failpoints, uploads
from storage.checksums import INLINE_BYTES, PiecesReader, RunningChecksum, checksum, size_of
from storage.database import Database
from storage.errors import DamagedObjectError
from storage.failpoints import Point
from storage.objects import ObjectStore


@dataclass(frozen=True)
class Stored:
    """Where bytes are: `inline`, or under an object `key`; neither if there are none.

    Attributes:
        sha256: of an object that was just put; `name` writes it down.
    """

    inline: bytes | None = None
    key: str | None = None
    size_bytes: int = 0
    sha256: str | None = None


class PayloadStore:
    """Puts and gets payloads and outcomes."""

    def __init__(
        self, database: Database, objects: ObjectStore, *, inline_bytes_max: int, upload_expiry_s: float
    ) -> None:
        self._database = database
        self._objects = objects
        self._inline_bytes_max = inline_bytes_max
        self._upload_expiry_s = upload_expiry_s

    def put(self, data: bytes, key: str) -> Stored:
        """Store bytes, under the fresh `key` if they are too large for a row. Call `name` in the row's transaction."""
        if self.is_inline(len(data)):
            return Stored(inline=data, size_bytes=len(data))
        return Stored(key=key, size_bytes=len(data), sha256=self.put_object(data, key))

    def is_inline(self, size_bytes: int) -> bool:
        """Whether so many bytes are stored in a row."""
        return size_bytes <= self._inline_bytes_max

    def put_object(self, data: bytes, key: str) -> str:
        """Announce and put an object, whatever its size; returns its checksum."""
        if len(data) >= INLINE_BYTES:
            return self.put_pieces([data], key)
        with self._announced(key):
            self._objects.put(key, data)
        return checksum(data)

    def put_pieces(self, pieces: Sequence[bytes | memoryview], key: str) -> str:
        """Announce and put an object that lies in memory in pieces, without joining them; returns its checksum."""
        with self._announced(key), RunningChecksum() as running:
            for piece in pieces:
                running.update(piece)
            self._objects.put(key, cast(BinaryIO, PiecesReader(pieces)), size_bytes=size_of(pieces))
            return running.hexdigest()

    @contextlib.contextmanager
    def _announced(self, key: str) -> Iterator[None]:
        """Announce an object that the block puts.

        One that comes so late that its announcement was swept away is removed again: no row knows it any more, and it
        would lie there for ever. Naming it is refused then.
        """
        failpoints.reach(Point.UPLOAD_BEGUN)
        begun = time.monotonic()
        with self._database.begin() as tx:
            now = self._database.now(tx)
            expires_at = self._database.after(tx, self._upload_expiry_s)
            uploads.announce(tx, key, now=now, expires_at=expires_at)
        failpoints.reach(Point.UPLOAD_ANNOUNCED)
        yield
        failpoints.reach(Point.UPLOAD_PUT)
        may_be_late = time.monotonic() - begun >= self._upload_expiry_s / 2  # long before the database says so
        if may_be_late:
            self._remove_if_late(key)

    def _remove_if_late(self, key: str) -> None:
        with self._database.read() as tx:
            awaited = uploads.is_awaited(tx, key)
        if not awaited:
            self._objects.delete([key])

    def get(self, stored: Stored) -> bytes:
        """The bytes.

        Raises:
            ObjectNotFoundError: the object is gone.
            DamagedObjectError: it is not what was put.
        """
        if stored.key is not None:
            return self.get_object(stored.key)
        return stored.inline or b""

    def get_object(self, key: str) -> bytes:
        """A named object, held against the checksum it was named with.

        Raises:
            ObjectNotFoundError: the object is gone.
            DamagedObjectError: it is not what was put.
        """
        with self._database.read() as tx:
            expected = uploads.find_checksum(tx, key)
        data = self._objects.get(key)
        if expected is not None and checksum(data) != expected:
            raise DamagedObjectError(key)
        return data


def name(tx: Connection, stored: Stored) -> None:
    """Turn the upload into a reference, in the transaction of the row that names it.

    Raises:
        UploadGoneError: the upload expired; store the bytes again.
    """
    if stored.key is not None:
        uploads.reference(tx, stored.key, size_bytes=stored.size_bytes, sha256=stored.sha256)
