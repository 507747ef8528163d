"""What is particular to objects on S3: who may, what breaks, what is tried again; the rest is in the contract."""

import contextlib
import io
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from storage import s3_client
from storage.errors import ObjectNotFoundError, ObjectStoreRefusedError, ObjectStoreUnavailableError
from storage.object_url import open_object_store, s3_location
from storage.objects import CHUNK_BYTES
from storage.s3 import PART_BYTES, S3ObjectStore
from tests.servers import CephServer, free_port

_DATA = bytes(range(256)) * 40_000  # 10 MB, several chunks


class _FaultyServer(ThreadingHTTPServer):
    """Just enough S3 to fail on order: a GET with ranges, and puts.

    Attributes:
        breaks_after: byte counts after which the next GETs lose their connection.
        statuses: statuses that the next requests get instead of an answer.
        requests: method, path with query and Range of every request.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _FaultyHandler)
        self.breaks_after: list[int] = []
        self.statuses: list[int] = []
        self.retry_after = ""
        self.is_silent = threading.Event()
        self.go_on = threading.Event()
        self.requests: list[tuple[str, str, str | None]] = []
        self.completions = 0


class _FaultyHandler(BaseHTTPRequestHandler):
    server: _FaultyServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self._failed():
            return
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        body = _DATA[int(found[1]) :] if found else _DATA
        self._answer(206 if found else 200, body, self.server.breaks_after)

    def do_HEAD(self) -> None:
        if not self._failed():
            self.send_response(200)
            self.send_header("Content-Length", str(PART_BYTES + 1))
            self.send_header("Last-Modified", "Mon, 23 Nov 2026 13:00:00 GMT")
            self.end_headers()

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if not self._failed():
            self._answer(200, b"", [], etag='"0"')

    def do_DELETE(self) -> None:
        if not self._failed():
            self.send_response(204)
            self.end_headers()

    def do_POST(self) -> None:
        """Begin a multipart put; or complete it, once, with the answer lost."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self._failed():
            return
        if "uploads" in parse_qs(urlsplit(self.path).query, keep_blank_values=True):
            body = b"<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>"
            self._answer(200, body, [])
            return
        self.server.completions += 1
        if self.server.completions == 1:
            self.close_connection = True
            return
        self._answer(404, b"<Error><Code>NoSuchUpload</Code><Message>gone</Message></Error>", [])

    def log_message(self, format: str, *args: object) -> None:
        """Keep the tests' output clean."""

    def _failed(self) -> bool:
        self.server.requests.append((self.command, self.path, self.headers.get("Range")))
        if self.server.is_silent.is_set():
            self.server.go_on.wait()
            self.close_connection = True
            return True
        if not self.server.statuses:
            return False
        self._answer(self.server.statuses.pop(0), b"<Error><Code>Busy</Code><Message>later</Message></Error>", [])
        return True

    def _answer(self, status: int, body: bytes, breaks_after: list[int], *, etag: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        if etag:
            self.send_header("ETag", etag)
        if status >= 400 and self.server.retry_after:
            self.send_header("Retry-After", self.server.retry_after)
        self.end_headers()
        if breaks_after:
            body = body[: breaks_after.pop(0)]
            self.close_connection = True
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(body)


@pytest.fixture
def faulty() -> Iterator[_FaultyServer]:
    """A server that fails on order."""
    with _FaultyServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.go_on.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def faulty_store(faulty: _FaultyServer) -> Iterator[S3ObjectStore]:
    """A store on the server that fails on order."""
    store = S3ObjectStore(s3_location(f"s3://AK:hunter2@127.0.0.1:{faulty.server_port}/bucket?secure=false"))
    yield store
    store.close()


def test_a_download_that_breaks_is_taken_up_where_it_broke(faulty: _FaultyServer, faulty_store: S3ObjectStore) -> None:
    # Given
    faulty.breaks_after = [3_000_000, 2_000_000]
    # When
    data = faulty_store.get("a")
    # Then
    assert data == _DATA
    starts = [int(asked.removeprefix("bytes=").rstrip("-")) for _, _, asked in faulty.requests[1:] if asked]
    assert starts == [2 * CHUNK_BYTES, 3 * CHUNK_BYTES]


def test_a_download_that_breaks_without_end_is_given_up(faulty: _FaultyServer, faulty_store: S3ObjectStore) -> None:
    # Given
    faulty.breaks_after = [0] * 100
    # When
    with pytest.raises(ObjectStoreUnavailableError) as raised:
        faulty_store.get("a")
    # Then
    assert raised.value.retryable
    assert len(faulty.requests) < 10


@pytest.mark.parametrize("call", ["put", "get"])
def test_a_server_that_says_nothing_is_given_up(
    faulty: _FaultyServer, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    # Given
    monkeypatch.setattr(s3_client, "ANSWER_S", 0.1)
    store = S3ObjectStore(s3_location(f"s3://AK:hunter2@127.0.0.1:{faulty.server_port}/bucket?secure=false"))
    faulty.is_silent.set()
    # When
    with pytest.raises(ObjectStoreUnavailableError) as raised:
        store.put("a", b"x") if call == "put" else store.get("a")
    # Then: asked twice, and no more
    assert raised.value.retryable
    assert len(faulty.requests) == 2
    store.close()


def test_a_server_that_asks_for_an_hour_does_not_get_it(faulty: _FaultyServer, faulty_store: S3ObjectStore) -> None:
    faulty.statuses, faulty.retry_after = [503, 429], "3600"
    faulty_store.put("a", b"x")
    assert len(faulty.requests) == 3


def test_a_server_that_is_full_counts_as_unavailable(faulty: _FaultyServer, faulty_store: S3ObjectStore) -> None:
    faulty.statuses = [507]
    with pytest.raises(ObjectStoreUnavailableError) as raised:
        faulty_store.put("a", b"x")
    assert raised.value.retryable
    # and: there is room again
    faulty_store.put("a", b"x")


def test_a_server_that_is_busy_is_asked_again(faulty: _FaultyServer, faulty_store: S3ObjectStore) -> None:
    # Given
    faulty.statuses = [503, 500]
    # When
    faulty_store.put("a", b"x")
    # Then
    assert [method for method, _, _ in faulty.requests] == ["PUT", "PUT", "PUT"]


def test_a_server_that_stays_busy_is_unavailable(faulty: _FaultyServer) -> None:
    # Given
    store = S3ObjectStore(s3_location(f"s3://AK:hunter2@127.0.0.1:{faulty.server_port}/bucket?secure=false&retries=1"))
    faulty.statuses = [503] * 10
    # When
    with pytest.raises(ObjectStoreUnavailableError, match="Busy"):
        store.put("a", b"x")
    # Then
    assert len(faulty.requests) == 2
    store.close()


def test_a_completion_whose_answer_was_lost_counts_if_the_object_is_there(
    faulty: _FaultyServer, faulty_store: S3ObjectStore
) -> None:
    # Given a multipart put of the size that HEAD will tell
    data = io.BytesIO(bytes(PART_BYTES + 1))
    # When
    faulty_store.put("a", data, size_bytes=PART_BYTES + 1)
    # Then
    assert faulty.completions == 2


def test_a_completion_whose_answer_was_lost_fails_if_something_else_is_there(
    faulty: _FaultyServer, faulty_store: S3ObjectStore
) -> None:
    # Given
    data = io.BytesIO(bytes(PART_BYTES + 2))
    # Then
    with pytest.raises(ObjectStoreUnavailableError, match="NoSuchUpload"):
        faulty_store.put("a", data, size_bytes=PART_BYTES + 2)


def test_a_server_that_does_not_answer_is_unavailable() -> None:
    # Given
    store = open_object_store(f"s3://AK:hunter2@127.0.0.1:{free_port()}/bucket?secure=false&retries=0")
    # When
    with pytest.raises(ObjectStoreUnavailableError) as raised:
        store.check()
    # Then
    assert "hunter2" not in str(raised.value)
    store.close()


def test_signing_asks_nobody_and_names_the_public_endpoint() -> None:
    # Given a server that is not there
    url = f"s3://AK:hunter2@127.0.0.1:{free_port()}/bucket/pre?secure=false&public_endpoint=https://files.example"
    store = open_object_store(url)
    # When
    signed = store.signed_url("a/b", expires_s=60)
    # Then
    assert signed is not None
    assert signed.startswith("https://files.example/bucket/pre/a/b?")
    assert "X-Amz-Expires=60" in signed
    assert "hunter2" not in signed
    store.close()


def test_a_store_may_be_told_not_to_sign() -> None:
    # Given
    store = open_object_store("s3://AK:hunter2@127.0.0.1:9/bucket?secure=false&signed_urls=false")
    # Then
    assert store.signed_url("a", expires_s=60) is None
    store.close()


@pytest.mark.servers
@pytest.mark.parametrize("wrong", ["access key", "secret key"])
def test_wrong_credentials_are_refused_without_showing_them(s3: CephServer, fresh_bucket_url: str, wrong: str) -> None:
    # Given
    bucket = fresh_bucket_url.rpartition("@")[2]
    pair = "nobody:hunter2" if wrong == "access key" else f"{s3.access_key}:hunter2"
    store = open_object_store(f"s3://{pair}@{bucket}")
    # Then
    for use in (store.check, lambda: store.get("a"), lambda: store.exists("a"), lambda: list(store.list())):
        with pytest.raises(ObjectStoreRefusedError) as raised:
            use()
        assert "hunter2" not in str(raised.value)
        assert not raised.value.retryable
    with pytest.raises(ObjectStoreRefusedError):
        store.delete(["a"])
    store.close()


@pytest.mark.servers
def test_a_missing_bucket_is_refused_by_name(s3_url: str) -> None:
    # Given
    store = open_object_store(f"{s3_url}/no-such-bucket?secure=false")
    # Then
    with pytest.raises(ObjectStoreRefusedError, match=r"no-such-bucket.*NoSuchBucket"):
        store.check()
    store.close()


@pytest.mark.servers
def test_a_bucket_is_made_when_asked_for_and_only_once(s3: CephServer, s3_url: str) -> None:
    # Given
    url = f"{s3_url}/made-by-ourselves?secure=false&create=true"
    # When
    first, second = open_object_store(url), open_object_store(url)
    first.put("a", b"x")
    # Then
    assert second.get("a") == b"x"
    first.close()
    second.close()
    s3.delete_bucket(url)


@pytest.mark.servers
def test_stores_with_different_prefixes_share_a_bucket_and_see_nothing_of_each_other(fresh_bucket_url: str) -> None:
    # Given
    bucket, _, options = fresh_bucket_url.partition("?")
    one, two = open_object_store(f"{bucket}/one?{options}"), open_object_store(f"{bucket}/two/deep?{options}")
    # When
    one.put("a", b"1")
    two.put("a", b"2")
    two.put("b", b"2")
    # Then
    assert (one.get("a"), two.get("a")) == (b"1", b"2")
    assert [info.key for info in one.list()] == ["a"]
    assert [info.key for info in two.list()] == ["a", "b"]
    # When
    one.delete(["a", "b"])
    # Then
    with pytest.raises(ObjectNotFoundError):
        one.get("a")
    assert two.exists("b")
    one.close()
    two.close()
