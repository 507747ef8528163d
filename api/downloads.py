"""Files of checkpoints to be downloaded: links to them, signed by the object store if it can, else by us; and archives.

A link of ours carries no credential but its own signature (HMAC-SHA256 over what it names and until when), so it can be
handed to any tool. Every api process of an installation needs the same signing key: it is a setting, or lies in the
data directory.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import os
import secrets
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from storage.objects import ObjectStore

KEY_FILE = "url_signing.key"
COMPLETE_MARKER = "checkpoint_complete"
"""Empty file of an archive; older clients refuse an archive without it."""


@dataclass(frozen=True)
class UrlSigner:
    """Signs and checks download links."""

    key: bytes

    @classmethod
    def open(cls, data_dir: Path, *, key: str = "") -> UrlSigner:
        """Sign with `key`, or with the one in the data directory, which is made if there is none."""
        return cls(key.encode() if key else _key_in(data_dir))

    def path(self, subject: str, expires_at: datetime) -> str:
        """`{expiry}/{signature}/{subject}`: the end of a link, after the route that checks it."""
        expiry = int(expires_at.timestamp())
        return f"{expiry}/{self._signature(subject, expiry)}/{quote(subject)}"

    def is_valid(self, subject: str, expiry: int, signature: str, *, now: datetime) -> bool:
        """Whether we signed this link and its time is not over."""
        same = hmac.compare_digest(self._signature(subject, expiry).encode(), signature.encode())
        return same and now.timestamp() < expiry

    def _signature(self, subject: str, expiry: int) -> str:
        digest = hmac.new(self.key, f"{expiry}:{subject}".encode(), hashlib.sha256).digest()
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def _key_in(data_dir: Path) -> bytes:
    """Of several processes that make it at once, all read the one that was first."""
    path = data_dir / KEY_FILE
    if not path.exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        unfinished = data_dir / f".{KEY_FILE}-{secrets.token_hex(8)}"
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):
            os.link(unfinished, path)
        unfinished.unlink()
    return path.read_bytes()


def archive(objects: ObjectStore, files: Mapping[str, Mapping[str, Any]]) -> Iterator[bytes]:
    """A plain tar of a checkpoint's files, in pieces, with the marker that says it is whole as the last member."""
    for name, file in sorted(files.items()):
        yield from _member(name, file["size"])
        yield from objects.stream(file["key"])
        yield bytes(-file["size"] % tarfile.BLOCKSIZE)
    yield from _member(COMPLETE_MARKER, 0)
    yield bytes(2 * tarfile.BLOCKSIZE)


def archive_bytes(files: Mapping[str, Mapping[str, Any]]) -> int:
    """How long that archive is."""
    block = tarfile.BLOCKSIZE
    sizes: list[int] = [file["size"] for file in files.values()]
    return sum(block + size + -size % block for size in sizes) + 3 * block


def _member(name: str, size: int) -> Iterator[bytes]:
    info = tarfile.TarInfo(name)
    info.size = size
    yield info.tobuf(tarfile.USTAR_FORMAT)
