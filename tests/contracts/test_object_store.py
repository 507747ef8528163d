"""What every object store promises, on a directory and on a real S3 server, or on the one of `--object-store-url`."""

import hashlib
import io
import secrets
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from storage.errors import InvalidObjectKeyError, ObjectNotFoundError
from storage.keys import KEY_BYTES_MAX, SEGMENT_BYTES_MAX
from storage.object_url import open_object_store
from storage.objects import CHUNK_BYTES, ObjectStore

_MIB = 1 << 20
_LARGE_BYTES = 20 * _MIB + 7  # more than one part of a multipart put
_REFUSED_KEYS = [
    "",
    "/",
    "/a",
    "a/",
    "a//b",
    "..",
    "../a",
    "a/../b",
    "a/.",
    ".hidden",
    "a/.hidden",
    "a b",
    "a:b",
    "a\\b",
    "a\nb",
    "a\x00b",
    "a?b",
    "a%2Fb",
    "é",
    "a" * (SEGMENT_BYTES_MAX + 1),
    "a/" * (KEY_BYTES_MAX // 2) + "aa",
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One round per implementation; a given URL is the only one."""
    if "store_kind" in metafunc.fixturenames:
        given = metafunc.config.getoption("--object-store-url")
        kinds = ["given"] if given else ["directory", pytest.param("s3", marks=pytest.mark.servers)]
        metafunc.parametrize("store_kind", kinds, scope="function")


@pytest.fixture
def store(store_kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    """A store with nothing in it below `base`."""
    match store_kind:
        case "given":
            url = request.config.getoption("--object-store-url")
        case "directory":
            url = (tmp_path / "objects").as_uri()
        case _:
            url = request.getfixturevalue("fresh_bucket_url")
    store = open_object_store(url)
    yield store
    store.close()


@pytest.fixture
def base(store: ObjectStore) -> Iterator[str]:
    """Where the test's keys begin; a given store may hold other things. What lies there goes with the test."""
    base = f"contract-{secrets.token_hex(8)}"
    yield base
    store.delete([info.key for info in store.list(base)])


def _random(size_bytes: int) -> bytes:
    return secrets.token_bytes(size_bytes)


def test_what_was_put_is_what_is_got(store: ObjectStore, base: str) -> None:
    # Given
    data = _random(3000)
    # When
    store.put(f"{base}/a", data)
    # Then
    assert store.get(f"{base}/a") == data


def test_an_object_may_be_empty(store: ObjectStore, base: str) -> None:
    # When
    store.put(f"{base}/empty", b"")
    # Then
    assert store.get(f"{base}/empty") == b""
    assert list(store.stream(f"{base}/empty")) == []
    assert store.get_range(f"{base}/empty", 0, 10) == b""
    assert store.stat(f"{base}/empty").size_bytes == 0


@pytest.mark.parametrize("key", ["a", "0", "-", "_", "a.b", "x=3A0", "A-Z_a-z.0-9", "a" * SEGMENT_BYTES_MAX])
def test_every_plain_key_is_taken(store: ObjectStore, base: str, key: str) -> None:
    # When
    store.put(f"{base}/{key}", key.encode())
    # Then
    assert store.get(f"{base}/{key}") == key.encode()
    assert [info.key for info in store.list(f"{base}/{key}")] == [f"{base}/{key}"]


def test_the_longest_key_is_taken(store: ObjectStore, base: str) -> None:
    # Given
    key = (f"{base}/" + ("d" * 100 + "/") * 10)[: KEY_BYTES_MAX - 1] + "z"
    # When
    store.put(key, b"far")
    # Then
    assert store.get(key) == b"far"


def test_a_file_is_put(store: ObjectStore, base: str, tmp_path: Path) -> None:
    # Given
    path = tmp_path / "file"
    path.write_bytes(_random(5000))
    # When
    store.put(f"{base}/file", path)
    # Then
    assert store.get(f"{base}/file") == path.read_bytes()


def test_a_missing_file_is_not_put(store: ObjectStore, base: str, tmp_path: Path) -> None:
    # When
    with pytest.raises(FileNotFoundError):
        store.put(f"{base}/file", tmp_path / "none")
    # Then
    assert not store.exists(f"{base}/file")


def test_a_stream_is_put_from_where_it_stands_and_as_far_as_said(store: ObjectStore, base: str) -> None:
    # Given
    stream = io.BytesIO(b"skip, keep, leave")
    stream.seek(6)
    # When
    store.put(f"{base}/stream", stream, size_bytes=4)
    # Then
    assert store.get(f"{base}/stream") == b"keep"


@pytest.mark.parametrize("promised", [11, _LARGE_BYTES])
def test_a_stream_that_ends_early_stores_nothing(store: ObjectStore, base: str, promised: int) -> None:
    # Given
    stream = io.BytesIO(_random(promised - 1))
    # When
    with pytest.raises(ValueError, match=f"ended 1 bytes before size_bytes={promised}"):
        store.put(f"{base}/short", stream, size_bytes=promised)
    # Then
    assert not store.exists(f"{base}/short")
    assert list(store.list(base)) == []


def test_a_length_goes_with_a_stream_and_only_there(store: ObjectStore, base: str) -> None:
    with pytest.raises(ValueError, match="size_bytes"):
        store.put(f"{base}/a", io.BytesIO(b"abc"))
    with pytest.raises(ValueError, match="size_bytes"):
        store.put(f"{base}/a", b"abc", size_bytes=3)
    assert not store.exists(f"{base}/a")


def test_a_large_file_comes_back_the_same(store: ObjectStore, base: str, tmp_path: Path) -> None:
    # Given
    path, back = tmp_path / "large", tmp_path / "new" / "back"
    path.write_bytes(_random(_LARGE_BYTES))
    # When
    store.put(f"{base}/large", path)
    info = store.download(f"{base}/large", back)
    # Then
    assert info.size_bytes == _LARGE_BYTES
    assert hashlib.sha256(back.read_bytes()).digest() == hashlib.sha256(path.read_bytes()).digest()
    assert [found.name for found in back.parent.iterdir()] == ["back"]


def test_a_large_stream_comes_back_in_chunks(store: ObjectStore, base: str) -> None:
    # Given
    data = _random(_LARGE_BYTES)
    # When
    store.put(f"{base}/large", io.BytesIO(data), size_bytes=len(data))
    chunks = list(store.stream(f"{base}/large"))
    # Then
    assert all(0 < len(chunk) <= CHUNK_BYTES for chunk in chunks)
    assert b"".join(chunks) == data


def test_a_second_put_of_the_same_bytes_is_harmless(store: ObjectStore, base: str) -> None:
    # Given
    store.put(f"{base}/a", b"same")
    # When
    store.put(f"{base}/a", b"same")
    # Then
    assert store.get(f"{base}/a") == b"same"
    assert len(list(store.list(base))) == 1


def test_a_missing_key_is_not_found(store: ObjectStore, base: str, tmp_path: Path) -> None:
    # Given
    key = f"{base}/missing"
    store.put(f"{base}/missing-not", b"a neighbour")
    # Then
    for read in (store.get, store.stat, store.stream):
        with pytest.raises(ObjectNotFoundError) as raised:
            read(key)
        assert raised.value.key == key
    for start, length in ((0, 1), (0, 0), (5, 5)):
        with pytest.raises(ObjectNotFoundError):
            store.get_range(key, start, length)
    with pytest.raises(ObjectNotFoundError):
        store.download(key, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not store.exists(key)


def test_the_beginning_of_a_key_is_no_object(store: ObjectStore, base: str) -> None:
    # Given
    store.put(f"{base}/a/b", b"x")
    # Then
    assert not store.exists(f"{base}/a")
    with pytest.raises(ObjectNotFoundError):
        store.get(f"{base}/a")
    with pytest.raises(ObjectNotFoundError):
        store.get(f"{base}/a/b/c")
    store.delete([f"{base}/a", f"{base}/a/b/c"])
    assert store.exists(f"{base}/a/b")


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [
        (0, 4, b"0123"),
        (3, 4, b"3456"),
        (0, 10, b"0123456789"),
        (9, 1, b"9"),
        (8, 100, b"89"),
        (0, 1 << 40, b"0123456789"),
        (10, 1, b""),
        (500, 5, b""),
        (4, 0, b""),
    ],
)
def test_a_range_ends_where_the_object_ends(
    store: ObjectStore, base: str, start: int, length: int, expected: bytes
) -> None:
    # Given
    store.put(f"{base}/digits", b"0123456789")
    # Then
    assert store.get_range(f"{base}/digits", start, length) == expected


@pytest.mark.parametrize(("start", "length"), [(-1, 5), (0, -1)])
def test_a_negative_range_is_refused(store: ObjectStore, base: str, start: int, length: int) -> None:
    with pytest.raises(ValueError, match="negative"):
        store.get_range(f"{base}/a", start, length)


def test_stat_tells_size_and_time(store: ObjectStore, base: str) -> None:
    # Given
    before = datetime.now(UTC)
    # When
    store.put(f"{base}/a", b"12345")
    # Then
    info = store.stat(f"{base}/a")
    assert (info.key, info.size_bytes) == (f"{base}/a", 5)
    assert info.modified_at.tzinfo is not None
    assert abs(info.modified_at - before) < timedelta(minutes=5)
    (listed,) = store.list(f"{base}/a")
    assert (listed.key, listed.size_bytes) == (info.key, info.size_bytes)
    assert abs(listed.modified_at - info.modified_at) < timedelta(seconds=2)


def test_a_listing_is_in_the_order_of_the_bytes(store: ObjectStore, base: str) -> None:
    # Given names whose order differs between bytes, words and directories
    names = ["a", "a-b", "a.b", "a=b", "a0", "aa/b", "b/1", "b-1", "b.1", "b0/1", "B", "_", "c/d/e/f", "c/d-e", "-"]
    for name in names:
        store.put(f"{base}/{name}", b"")
    # When
    listed = [info.key.removeprefix(f"{base}/") for info in store.list(f"{base}/")]
    # Then
    assert listed == sorted(names)


def test_more_keys_than_fit_a_page_are_listed_once_each_in_order(store: ObjectStore, base: str) -> None:
    # Given
    keys = [f"{base}/many/{number:012d}" for number in range(1203)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, b"x"), reversed(keys)))
    # Then
    assert [info.key for info in store.list(f"{base}/many/")] == keys
    # When
    store.delete(keys)
    # Then
    assert list(store.list(base)) == []


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("", ["run-1/a", "run-1/b", "run-10/a", "run-2"]),
        ("run", ["run-1/a", "run-1/b", "run-10/a", "run-2"]),
        ("run-1", ["run-1/a", "run-1/b", "run-10/a"]),
        ("run-1/", ["run-1/a", "run-1/b"]),
        ("run-1/b", ["run-1/b"]),
        ("run-1/b/", []),
        ("run-2", ["run-2"]),
        ("run-2/", []),
        ("none", []),
    ],
)
def test_a_prefix_is_a_beginning_of_text(store: ObjectStore, base: str, start: str, expected: list[str]) -> None:
    # Given
    for name in ("run-1/a", "run-1/b", "run-10/a", "run-2"):
        store.put(f"{base}/{name}", b"")
    # When
    listed = [info.key.removeprefix(f"{base}/") for info in store.list(f"{base}/{start}")]
    # Then
    assert listed == expected


def test_deleting_twice_is_deleting_once(store: ObjectStore, base: str) -> None:
    # Given
    store.put(f"{base}/a/1", b"1")
    store.put(f"{base}/a/2", b"2")
    # When
    store.delete([f"{base}/a/1", f"{base}/a/none", f"{base}/none"])
    store.delete(key for key in [f"{base}/a/1"])
    store.delete([])
    # Then
    assert [info.key for info in store.list(base)] == [f"{base}/a/2"]


@pytest.mark.parametrize("key", _REFUSED_KEYS, ids=lambda key: repr(key[:12]))
def test_a_key_that_is_not_plain_is_refused_everywhere(store: ObjectStore, tmp_path: Path, key: str) -> None:
    # Given
    uses = [
        lambda: store.put(key, b"x"),
        lambda: store.get(key),
        lambda: store.get_range(key, 0, 1),
        lambda: store.stream(key),
        lambda: store.download(key, tmp_path / "new"),
        lambda: store.stat(key),
        lambda: store.exists(key),
        lambda: store.delete([key]),
        lambda: store.signed_url(key, expires_s=60),
    ]
    # Then
    for use in uses:
        with pytest.raises(InvalidObjectKeyError):
            use()


@pytest.mark.parametrize("start", ["/", "..", "a//", "a b", ".hidden", "a/../"])
def test_a_prefix_that_begins_no_key_is_refused(store: ObjectStore, start: str) -> None:
    with pytest.raises(InvalidObjectKeyError):
        list(store.list(start))


def test_many_threads_write_and_read_at_once(store: ObjectStore, base: str) -> None:
    # Given
    def write_read_delete(number: int) -> bool:
        key, data = f"{base}/shared/{number % 4}/{number}", _random(10_000)
        store.put(key, data)
        same = store.get(key) == data
        store.delete([key])
        return same and not store.exists(key)

    # When
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(write_read_delete, range(200)))
    # Then
    assert all(results)
    assert list(store.list(base)) == []


def test_readers_see_a_whole_object_or_none(store: ObjectStore, base: str) -> None:
    # Given a reader that looks while the same bytes are put again and again
    data = _random(2 * _MIB)
    seen: list[bool] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                seen.append(store.get(f"{base}/a") == data)
            except ObjectNotFoundError:
                continue

    reader = threading.Thread(target=read)
    reader.start()
    # When
    for _ in range(10):
        store.put(f"{base}/a", data)
    while not seen and reader.is_alive():
        pass
    done.set()
    reader.join()
    # Then
    assert seen
    assert all(seen)


def test_a_download_replaces_the_file_that_was_there(store: ObjectStore, base: str, tmp_path: Path) -> None:
    # Given
    path = tmp_path / "file"
    path.write_bytes(b"an old and longer one")
    store.put(f"{base}/a", b"new")
    # When
    store.download(f"{base}/a", path)
    # Then
    assert path.read_bytes() == b"new"


def test_a_signed_url_gives_the_object_to_whoever_has_it(store: ObjectStore, base: str) -> None:
    # Given
    store.put(f"{base}/a=3Ab", b"for you")
    # When
    url = store.signed_url(f"{base}/a=3Ab", expires_s=60)
    # Then
    if url is not None:
        with urllib.request.urlopen(url) as response:
            assert response.read() == b"for you"


@pytest.mark.parametrize("expires_s", [0, -1, 7 * 24 * 3600 + 1])
def test_a_lifetime_that_no_url_can_have_is_refused(store: ObjectStore, expires_s: int) -> None:
    with pytest.raises(ValueError, match="expires_s"):
        store.signed_url("a", expires_s=expires_s)


def test_a_store_that_works_passes_its_check_and_keeps_nothing_of_it(store: ObjectStore) -> None:
    # When
    store.check()
    # Then
    assert list(store.list("checks/")) == []
