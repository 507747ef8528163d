"""Bytes of payloads and outcomes: inline in the row when small, else an object that the row names (claim check)."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection

from storage import failpoints, uploads
from storage.database import Database
from storage.failpoints import Point
from storage.objects import ObjectStore


@dataclass(frozen=True)
class Stored:
    """Where bytes are: `inline`, or under an object `key`; neither if there are none."""

    inline: bytes | None = None
    key: str | None = None
    size_bytes: int = 0


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
        if len(data) <= self._inline_bytes_max:
            return Stored(inline=data, size_bytes=len(data))
        self.put_object(data, key)
        return Stored(key=key, size_bytes=len(data))

    def put_object(self, data: bytes, key: str) -> None:
        """Announce and put an object, whatever its size."""
        failpoints.reach(Point.UPLOAD_BEGUN)
        with self._database.begin() as tx:
            now = self._database.now(tx)
            expires_at = self._database.after(tx, self._upload_expiry_s)
            uploads.announce(tx, key, now=now, expires_at=expires_at)
        failpoints.reach(Point.UPLOAD_ANNOUNCED)
        self._objects.put(key, data)
        failpoints.reach(Point.UPLOAD_PUT)

    def get(self, stored: Stored) -> bytes:
        """The bytes.

        Raises:
            ObjectNotFoundError: the object is gone.
        """
        if stored.key is not None:
            return self._objects.get(stored.key)
        return stored.inline or b""


def name(tx: Connection, stored: Stored) -> None:
    """Turn the upload into a reference, in the transaction of the row that names it.

    Raises:
        UploadGoneError: the upload expired; store the bytes again.
    """
    if stored.key is not None:
        uploads.reference(tx, stored.key, size_bytes=stored.size_bytes)
