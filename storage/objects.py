"""The object store: large immutable values under keys. This file says what each implementation promises.

An object is written once, whole, under a fresh key from `storage.keys`, and never changed. So nothing here needs
conditional writes, versions or locks, and any S3 server or directory will do. Which objects are still needed is known
by rows of the database, not by the store: an object without a row is rubbish, and the sweeper deletes it.

Implementations: `storage.local` (a directory), `storage.s3` (MinIO or any S3). `storage.object_url` opens them.
Both are safe to use from many threads and many processes at once; an instance is not carried across a fork.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Protocol

CHUNK_BYTES = 1 << 20
SIGNED_URL_S_MAX = 7 * 24 * 3600  # S3's own limit


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a store knows about an object besides its bytes.

    Attributes:
        key: under which it lies.
        size_bytes: its length.
        modified_at: when it was written, by the store's clock; aware, UTC.
    """

    key: str
    size_bytes: int
    modified_at: datetime


class ObjectStore(Protocol):
    """Immutable objects under keys.

    Every method may raise `InvalidObjectKeyError` (the key is not plain, see `storage.keys.check_key`; nothing was
    done), `ObjectStoreRefusedError` (an operator has to correct something) and `ObjectStoreUnavailableError` (after
    bounded tries of its own; trying later may help). None of their messages holds a credential.
    """

    def put(self, key: str, data: bytes | Path | BinaryIO, *, size_bytes: int | None = None) -> None:
        """Store an object whole, or not at all; once this returns, it outlives a crash of any process.

        A second put of the same bytes under the same key is harmless, so a put of unknown outcome may be repeated.
        Different bytes under a key that is taken break the house's rule; the store does not look, the last one stays.
        Until put returns, readers find the key missing or the object whole, never a part of it.
        A file or stream is never held in memory as a whole.

        Args:
            key: a fresh one from `storage.keys`.
            data: the bytes; a file to read them from; or an open binary stream, read from where it stands.
            size_bytes: how many bytes the stream will give; needed with a stream and only there.

        Raises:
            ValueError: a stream without `size_bytes`, `size_bytes` without a stream, or a stream that ends before
                `size_bytes`; nothing was stored.
            FileNotFoundError: `data` is a path and no file lies there.
        """
        ...

    def get(self, key: str) -> bytes:
        """Return the whole object; for what is known to be small.

        Raises:
            ObjectNotFoundError: no object lies there.
        """
        ...

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return bytes `start` to `start + length`, fewer where the object ends, none where it ended before.

        Raises:
            ObjectNotFoundError: no object lies there, also where `length` is 0.
            ValueError: `start` or `length` is negative.
        """
        ...

    def stream(self, key: str) -> Iterator[bytes]:
        """Yield the object in chunks of at most `CHUNK_BYTES`, never empty ones.

        A connection that breaks is taken up again where it broke.

        Raises:
            ObjectNotFoundError: no object lies there; raised by this call itself, before the first chunk is asked for.
        """
        ...

    def download(self, key: str, path: Path) -> ObjectInfo:
        """Write the object to a local file, in chunks; the file appears whole or not at all, over one that was there.

        Missing parent directories are made.

        Raises:
            ObjectNotFoundError: no object lies there; `path` is as it was.
        """
        ...

    def stat(self, key: str) -> ObjectInfo:
        """Return size and time of an object without its bytes.

        Raises:
            ObjectNotFoundError: no object lies there.
        """
        ...

    def exists(self, key: str) -> bool:
        """Say whether an object lies under the key."""
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield what lies under keys that begin with `prefix`, in the order of the keys' bytes.

        The prefix is a beginning of text, not a directory: `runs/1` also finds `runs/10/x`. What is put or deleted
        meanwhile may be found or not; everything else is found once. Unfinished puts are never found.
        """
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects, any number of them. Keys under which nothing lies count as deleted.

        If it raises, some are deleted and some are not: call it again.
        """
        ...

    def signed_url(self, key: str, *, expires_s: int) -> str | None:
        """Return a URL from which anyone who has it can GET the object for `expires_s` seconds.

        Whether the object exists is not looked at.

        Returns:
            None where this store cannot sign, or is told not to; then the api serves the object itself.

        Raises:
            ValueError: `expires_s` is not within 1 and `SIGNED_URL_S_MAX`.
        """
        ...

    def check(self) -> None:
        """Write, read and delete a small object, to find out now what would fail later."""
        ...

    def close(self) -> None:
        """Give back connections. The store is not used afterwards."""
        ...


def check_expires(expires_s: int) -> None:
    """Refuse a lifetime that no signed URL can have.

    Raises:
        ValueError: it is not within 1 and `SIGNED_URL_S_MAX`.
    """
    if not 1 <= expires_s <= SIGNED_URL_S_MAX:
        raise ValueError(f"expires_s must be within 1 and {SIGNED_URL_S_MAX}, not {expires_s}")


def check_range(start: int, length: int) -> None:
    """Refuse a range that no object can have.

    Raises:
        ValueError: `start` or `length` is negative.
    """
    if start < 0 or length < 0:
        raise ValueError(f"start and length must not be negative: {start}, {length}")


def check_size(data: bytes | Path | BinaryIO, size_bytes: int | None) -> None:
    """Refuse a put whose length is not known, or said twice.

    Raises:
        ValueError: a stream comes without `size_bytes`, or bytes or a path with it.
    """
    is_stream = not isinstance(data, bytes | Path)
    if is_stream and (size_bytes is None or size_bytes < 0):
        raise ValueError("a stream is put with size_bytes, 0 or more")
    if not is_stream and size_bytes is not None:
        raise ValueError("size_bytes goes with a stream; bytes and files have their own length")
