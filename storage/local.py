"""An object store in a directory: one file per object, the key is its path.

For one machine, or several that share a file system. Unfinished files lie in `.scratch/` below the root until they
are whole; listing sees no name with a leading dot, and no key can have one. A directory goes with its last object.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from storage.atomic_file import clean_scratch, whole_file
from storage.errors import (
    InvalidObjectKeyError,
    ObjectNotFoundError,
    ObjectStoreRefusedError,
    ObjectStoreUnavailableError,
)
from storage.keys import check_key, check_prefix
from storage.objects import CHUNK_BYTES, ObjectInfo, check_expires, check_range, check_size

_SCRATCH = ".scratch"


class LocalObjectStore:
    """`ObjectStore` in a directory."""

    def __init__(self, root: Path, *, fsync: bool = True) -> None:
        """Make the directory if it is missing, and clear what dead writers left in it.

        Args:
            root: the directory.
            fsync: whether a put outlives a loss of power; without, only a crash of processes.

        Raises:
            ObjectStoreRefusedError: the directory cannot be made.
        """
        self._root = root.absolute()
        self._scratch = self._root / _SCRATCH
        self._fsync = fsync
        with self._translated():
            self._scratch.mkdir(parents=True, exist_ok=True)
            clean_scratch(self._scratch)

    def __repr__(self) -> str:
        return f"LocalObjectStore({str(self._root)!r})"

    def put(self, key: str, data: bytes | Path | BinaryIO, *, size_bytes: int | None = None) -> None:
        """See `ObjectStore.put`."""
        path = self._path(key)
        check_size(data, size_bytes)
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(data.open("rb")) if isinstance(data, Path) else data
            stack.enter_context(self._translated(key))
            file = stack.enter_context(whole_file(path, scratch=self._scratch, fsync=self._fsync))
            if isinstance(source, bytes):
                file.write(source)
            elif size_bytes is None:
                shutil.copyfileobj(source, file, CHUNK_BYTES)
            else:
                _copy_exactly(source, file, size_bytes)

    def get(self, key: str) -> bytes:
        """See `ObjectStore.get`."""
        with self._open(key) as file, self._translated(key):
            return file.read()

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See `ObjectStore.get_range`."""
        check_range(start, length)
        with self._open(key) as file, self._translated(key):
            size = os.fstat(file.fileno()).st_size
            file.seek(min(start, size))
            return file.read(min(length, size))

    def stream(self, key: str) -> Iterator[bytes]:
        """See `ObjectStore.stream`."""
        return self._chunks(key, self._open(key))

    def download(self, key: str, path: Path) -> ObjectInfo:
        """See `ObjectStore.download`."""
        with self._open(key) as source, whole_file(path, fsync=self._fsync) as file:
            shutil.copyfileobj(source, file, CHUNK_BYTES)
            return _info(key, os.fstat(source.fileno()))

    def stat(self, key: str) -> ObjectInfo:
        """See `ObjectStore.stat`."""
        with self._open(key) as file:
            return _info(key, os.fstat(file.fileno()))

    def exists(self, key: str) -> bool:
        """See `ObjectStore.exists`."""
        return self._path(key).is_file()

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See `ObjectStore.list`."""
        check_prefix(prefix)
        directory, _, _ = prefix.rpartition("/")
        with self._translated():
            yield from self._list_below(directory, prefix)

    def delete(self, keys: Iterable[str]) -> None:
        """See `ObjectStore.delete`."""
        for key in keys:
            path = self._path(key)
            with self._translated(key), contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                path.unlink()
                self._remove_empty(path.parent)

    def signed_url(self, key: str, *, expires_s: int) -> str | None:
        """A directory has no address: always None."""
        check_key(key)
        check_expires(expires_s)
        return None

    def check(self) -> None:
        """See `ObjectStore.check`."""
        key = f"checks/{secrets.token_hex(8)}"
        self.put(key, b"piecework")
        try:
            self.get(key)
        finally:
            self.delete([key])

    def close(self) -> None:
        """Nothing is held open."""

    def _path(self, key: str) -> Path:
        check_key(key)
        return self._root / key

    def _open(self, key: str) -> BinaryIO:
        """Open an object for reading; a directory or something else with its name is none."""
        path = self._path(key)
        if not path.is_file():
            raise ObjectNotFoundError(key)
        with self._translated(key):
            return path.open("rb")

    def _chunks(self, key: str, file: BinaryIO) -> Iterator[bytes]:
        with file, self._translated(key):
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    def _list_below(self, directory: str, prefix: str) -> Iterator[ObjectInfo]:
        """Walk in the order of keys: a directory sorts as its name with the slash that follows it."""
        for key, entry in _entries(self._root, directory):
            if key.endswith("/"):
                if key.startswith(prefix) or prefix.startswith(key):
                    yield from self._list_below(key.removesuffix("/"), prefix)
            elif key.startswith(prefix):
                with contextlib.suppress(FileNotFoundError):
                    yield _info(key, entry.stat(follow_symlinks=False))

    def _remove_empty(self, directory: Path) -> None:
        """A directory that is not empty stays, and one that a writer needs again is made again by it."""
        with contextlib.suppress(OSError):
            while directory != self._root:
                directory.rmdir()
                directory = directory.parent

    @contextlib.contextmanager
    def _translated(self, key: str | None = None) -> Iterator[None]:
        """Turn the file system's errors into ours."""
        try:
            yield
        except (IsADirectoryError, NotADirectoryError) as error:
            reason = "one object's key continues another's as a path"
            raise InvalidObjectKeyError(key or str(self._root), reason) from error
        except PermissionError as error:
            raise ObjectStoreRefusedError(str(self._root), f"{error.strerror}: {error.filename}") from error
        except FileNotFoundError as error:
            if key is not None and error.filename == str(self._root / key):
                raise ObjectNotFoundError(key) from error
            raise ObjectStoreUnavailableError(str(self._root), str(error)) from error
        except OSError as error:
            raise ObjectStoreUnavailableError(str(self._root), str(error)) from error


def _entries(root: Path, directory: str) -> list[tuple[str, os.DirEntry[str]]]:
    start = f"{directory}/" if directory else ""
    found: list[tuple[str, os.DirEntry[str]]] = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(root / directory) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                found.append((f"{start}{entry.name}/", entry))
            elif entry.is_file(follow_symlinks=False):
                found.append((f"{start}{entry.name}", entry))
    return sorted(found, key=_first)


def _first(pair: tuple[str, os.DirEntry[str]]) -> str:
    return pair[0]


def _info(key: str, stat: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, stat.st_size, datetime.fromtimestamp(stat.st_mtime, UTC))


def _copy_exactly(source: BinaryIO, file: BinaryIO, size_bytes: int) -> None:
    left = size_bytes
    while left and (chunk := source.read(min(left, CHUNK_BYTES))):
        file.write(chunk)
        left -= len(chunk)
    if left:
        raise ValueError(f"the stream ended {left} bytes before size_bytes={size_bytes}")
