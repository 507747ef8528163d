"""Small bytes lie in the row, large ones in the object store; what is named in time stays."""

import hashlib
from datetime import datetime, timedelta

import pytest

from storage import payloads, uploads
from storage.checksums import INLINE_BYTES
from storage.clock import FrozenClock
from storage.errors import DamagedObjectError, ObjectNotFoundError, UploadGoneError
from storage.open import Storage
from storage.payloads import Stored, name
from tests.fixtures import INLINE_BYTES_MAX


def test_bytes_up_to_the_limit_lie_in_the_row(storage: Storage) -> None:
    # When
    stored = storage.payloads.put(b"x" * INLINE_BYTES_MAX, "payloads/small")
    # Then
    assert stored == Stored(inline=b"x" * INLINE_BYTES_MAX, size_bytes=INLINE_BYTES_MAX)
    assert storage.payloads.get(stored) == b"x" * INLINE_BYTES_MAX
    assert not storage.objects.exists("payloads/small")


def test_more_bytes_lie_in_the_object_store(storage: Storage) -> None:
    # When
    stored = storage.payloads.put(b"x" * (INLINE_BYTES_MAX + 1), "payloads/large")
    # Then
    sha256 = hashlib.sha256(b"x" * (INLINE_BYTES_MAX + 1)).hexdigest()
    assert stored == Stored(key="payloads/large", size_bytes=INLINE_BYTES_MAX + 1, sha256=sha256)
    assert storage.payloads.get(stored) == b"x" * (INLINE_BYTES_MAX + 1)


def test_no_bytes_are_read_as_none(storage: Storage) -> None:
    assert storage.payloads.get(Stored()) == b""


def test_an_object_is_announced_before_it_is_put(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given
    announced: list[list[str]] = []
    real_put = storage.objects.put

    def put(key: str, data: bytes) -> object:
        with storage.database.begin() as tx:
            announced.append(list(uploads.take_unwanted(tx, now=_much_later(storage), limit=5)))
        return real_put(key, data)

    monkeypatch.setattr(storage.objects, "put", put)
    # When
    storage.payloads.put_object(b"x", "payloads/a")
    # Then
    assert announced == [["payloads/a"]]


def test_an_object_named_in_time_stays_and_a_late_name_is_refused(storage: Storage, clock: FrozenClock) -> None:
    # Given
    first, second = (storage.payloads.put(b"x" * 2_000, f"payloads/{name}") for name in ("a", "b"))
    with storage.database.begin() as tx:
        payloads.name(tx, first)
        payloads.name(tx, Stored(inline=b"in the row"))
    # When
    clock.advance(storage.settings.upload_expiry_s + 1)
    with storage.database.begin() as tx:
        assert uploads.take_unwanted(tx, now=clock.now(), limit=5) == ["payloads/b"]
    # Then
    with storage.database.begin() as tx, pytest.raises(UploadGoneError):
        payloads.name(tx, second)


def test_an_object_that_is_gone_is_told(storage: Storage) -> None:
    with pytest.raises(ObjectNotFoundError):
        storage.payloads.get(Stored(key="payloads/none", size_bytes=1))


def _much_later(storage: Storage) -> datetime:
    return storage.database.clock.now() + timedelta(days=365)


@pytest.mark.parametrize("size", [INLINE_BYTES_MAX + 1, INLINE_BYTES, 3 * INLINE_BYTES + 5])
def test_an_object_is_held_against_the_checksum_it_was_named_with(storage: Storage, size: int) -> None:
    # Given
    data = bytes(range(256)) * (size // 256 + 1)
    stored = storage.payloads.put(data, "payloads/large")
    with storage.database.begin() as tx:
        name(tx, stored)
    assert stored.sha256 == hashlib.sha256(data).hexdigest()
    assert storage.payloads.get(stored) == data
    # When
    storage.objects.put("payloads/large", data[:-1] + b"!")
    # Then
    with pytest.raises(DamagedObjectError, match="do not match its checksum"):
        storage.payloads.get(stored)


def test_pieces_are_stored_as_one_object(storage: Storage) -> None:
    # Given
    pieces = [b"header", memoryview(bytes(5_000_000)), b"", memoryview(bytearray(b"end"))]
    # When
    sha256 = storage.payloads.put_pieces(pieces, "snapshots/a")
    # Then
    whole = b"".join(bytes(piece) for piece in pieces)
    assert storage.objects.get("snapshots/a") == whole
    assert sha256 == hashlib.sha256(whole).hexdigest()
