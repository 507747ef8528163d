"""An object store on MinIO or any S3 server, through the `minio` client.

Only what every S3 server does alike is used: put, multipart put, get with a range, head, list, delete of many,
signed GET. Memory: a put holds at most four parts of `PART_BYTES`, a download one chunk.
"""

import contextlib
import io
import os
import secrets
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from minio.datatypes import Object
from minio.deleteobjects import DeleteError, DeleteObject
from minio.error import MinioException, S3Error
from urllib3.exceptions import HTTPError
from urllib3.response import BaseHTTPResponse

from storage.atomic_file import whole_file
from storage.errors import ObjectNotFoundError, ObjectStoreRefusedError, ObjectStoreUnavailableError, StorageError
from storage.keys import check_key, check_prefix
from storage.objects import CHUNK_BYTES, ObjectInfo, check_expires, check_range, check_size
from storage.s3_client import S3Location, make_client, make_pool

PART_BYTES = 16 << 20  # of a multipart put; S3 takes 10,000 parts, so larger ones beyond 160 GB
_NUM_PARTS_MAX = 10_000
_NUM_RESUMES = 5
_TRANSIENT_STATUSES = frozenset({408, 409, 429})
_TRANSIENT_CODES = frozenset({"RequestTimeout", "SlowDown", "InternalError", "OperationAborted", "NoSuchUpload"})


class S3ObjectStore:
    """`ObjectStore` in a bucket."""

    def __init__(self, location: S3Location) -> None:
        """Prepare a client; nothing is sent unless the bucket may have to be made.

        Raises:
            ObjectStoreRefusedError: the bucket is missing and may not be made.
            ObjectStoreUnavailableError: the bucket should be made, and the server does not answer.
        """
        self._location = location
        self._bucket = location.bucket
        self._start = f"{location.prefix}/" if location.prefix else ""
        self._http = make_pool(location)
        self._client = make_client(location, location.endpoint, secure=location.secure, pool=self._http)
        self._signer = self._client
        if location.public_endpoint:
            public = urlsplit(location.public_endpoint)
            self._signer = make_client(location, public.netloc, secure=public.scheme == "https", pool=self._http)
        if location.create:
            self._create_bucket()

    def __repr__(self) -> str:
        return f"S3ObjectStore({str(self._location)!r})"

    def put(self, key: str, data: bytes | Path | BinaryIO, *, size_bytes: int | None = None) -> None:
        """See `ObjectStore.put`."""
        check_key(key)
        check_size(data, size_bytes)
        if isinstance(data, bytes):
            self._put(key, io.BytesIO(data), len(data))
        elif isinstance(data, Path):
            with data.open("rb") as file:
                self._put(key, file, os.fstat(file.fileno()).st_size, num_parallel=3)
        else:
            assert size_bytes is not None  # check_size
            self._put(key, data, size_bytes)

    def get(self, key: str) -> bytes:
        """See `ObjectStore.get`."""
        return b"".join(self.stream(key))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See `ObjectStore.get_range`."""
        check_key(key)
        check_range(start, length)
        if length == 0:
            self.stat(key)
            return b""
        response = self._open(key, start, start + length)
        return b"".join(self._chunks(key, response, start, start + length))

    def stream(self, key: str) -> Iterator[bytes]:
        """See `ObjectStore.stream`."""
        check_key(key)
        return self._chunks(key, self._open(key, 0, None), 0, None)

    def download(self, key: str, path: Path) -> ObjectInfo:
        """See `ObjectStore.download`."""
        info = self.stat(key)
        with whole_file(path) as file:
            for chunk in self.stream(key):
                file.write(chunk)
        return info

    def stat(self, key: str) -> ObjectInfo:
        """See `ObjectStore.stat`."""
        check_key(key)
        with self._translated(key):
            return self._info(self._client.stat_object(self._bucket, self._start + key))

    def exists(self, key: str) -> bool:
        """See `ObjectStore.exists`."""
        try:
            self.stat(key)
        except ObjectNotFoundError:
            return False
        return True

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See `ObjectStore.list`."""
        check_prefix(prefix)
        with self._translated():
            for found in self._client.list_objects(self._bucket, prefix=self._start + prefix, recursive=True):
                yield self._info(found)

    def delete(self, keys: Iterable[str]) -> None:
        """See `ObjectStore.delete`."""
        with self._translated():
            errors = self._client.remove_objects(self._bucket, self._doomed(keys))
            failed: list[DeleteError] = [error for error in errors if error.code != "NoSuchKey"]
        if failed:
            reason = f"{len(failed)} objects could not be deleted, first {failed[0].name}: {failed[0].code}"
            raise self._failure(failed[0].code, 200, reason)

    def signed_url(self, key: str, *, expires_s: int) -> str | None:
        """See `ObjectStore.signed_url`."""
        check_key(key)
        check_expires(expires_s)
        if not self._location.signed_urls:
            return None
        url = self._signer.presigned_get_object(self._bucket, self._start + key, expires=timedelta(seconds=expires_s))
        return str(url)

    def check(self) -> None:
        """See `ObjectStore.check`."""
        key = f"checks/{secrets.token_hex(8)}"
        self.put(key, b"piecework")
        try:
            self.get(key)
        except ObjectNotFoundError as error:
            raise ObjectStoreRefusedError(str(self._location), "what was just written cannot be read") from error
        finally:
            self.delete([key])

    def close(self) -> None:
        """See `ObjectStore.close`."""
        self._http.clear()

    def _create_bucket(self) -> None:
        with self._translated():
            if self._client.bucket_exists(self._bucket):
                return
            try:
                self._client.make_bucket(self._bucket, location=self._location.region)
            except S3Error as error:
                if error.code != "BucketAlreadyOwnedByYou":  # another process was faster
                    raise

    def _put(self, key: str, source: BinaryIO, size_bytes: int, *, num_parallel: int = 1) -> None:
        part_bytes = max(PART_BYTES, -(-size_bytes // _NUM_PARTS_MAX))
        try:
            with self._translated(key):
                self._client.put_object(
                    self._bucket,
                    self._start + key,
                    _ExactReader(source, size_bytes),
                    size_bytes,
                    part_size=part_bytes,
                    num_parallel_uploads=num_parallel,
                )
        except ObjectStoreUnavailableError as error:
            if not self._was_completed(key, size_bytes, error):
                raise

    def _was_completed(self, key: str, size_bytes: int, error: ObjectStoreUnavailableError) -> bool:
        """A repeated completion of a multipart put finds no such upload where the first answer was lost."""
        cause = error.__cause__
        if not isinstance(cause, S3Error) or cause.code != "NoSuchUpload":
            return False
        try:
            return self.stat(key).size_bytes == size_bytes
        except ObjectNotFoundError:
            return False

    def _open(self, key: str, start: int, end: int | None) -> BaseHTTPResponse | None:
        """Ask for bytes from `start` to before `end`; None where the object ends before `start`."""
        length = 0 if end is None else end - start
        try:
            with self._translated(key):
                response: BaseHTTPResponse = self._client.get_object(
                    self._bucket, self._start + key, offset=start, length=length
                )
        except ObjectStoreRefusedError as error:
            if isinstance(error.__cause__, S3Error) and error.__cause__.code == "InvalidRange":
                return None
            raise
        if (start or length) and response.status != 206:
            response.close()
            raise ObjectStoreRefusedError(str(self._location), "it ignores the Range header")
        return response

    def _chunks(self, key: str, response: BaseHTTPResponse | None, start: int, end: int | None) -> Iterator[bytes]:
        """Objects are immutable, so a broken connection is taken up at the byte where it broke."""
        num_failures = 0
        while response is not None:
            try:
                with contextlib.closing(response):
                    for chunk in response.stream(CHUNK_BYTES):
                        start += len(chunk)
                        num_failures = 0
                        if chunk:
                            yield chunk
                return
            except HTTPError as error:
                num_failures += 1
                if num_failures > _NUM_RESUMES:
                    raise ObjectStoreUnavailableError(str(self._location), f"{key}: {error}") from error
                response = self._open(key, start, end)

    def _doomed(self, keys: Iterable[str]) -> Iterator[DeleteObject]:
        for key in keys:
            check_key(key)
            yield DeleteObject(self._start + key)

    def _info(self, found: Object) -> ObjectInfo:
        return ObjectInfo(found.object_name.removeprefix(self._start), found.size, found.last_modified)

    @contextlib.contextmanager
    def _translated(self, key: str | None = None) -> Iterator[None]:
        """Turn the client's errors into ours."""
        try:
            yield
        except S3Error as error:
            if error.code == "NoSuchKey" and key is not None:
                raise ObjectNotFoundError(key) from error
            raise self._failure(error.code, error.response.status, f"{error.code}: {error.message}") from error
        except (MinioException, HTTPError) as error:
            raise ObjectStoreUnavailableError(str(self._location), str(error)) from error

    def _failure(self, code: str | None, status: int, reason: str) -> StorageError:
        if code in _TRANSIENT_CODES or status in _TRANSIENT_STATUSES or status >= 500:
            return ObjectStoreUnavailableError(str(self._location), reason)
        return ObjectStoreRefusedError(str(self._location), reason)


class _ExactReader:
    """A stream that says so when it ends early, before the client has sent what there was."""

    def __init__(self, source: BinaryIO, size_bytes: int) -> None:
        self._source = source
        self._size_bytes = size_bytes
        self._left = size_bytes

    def read(self, size: int) -> bytes:
        data = self._source.read(min(size, self._left))
        if not data and self._left:
            raise ValueError(f"the stream ended {self._left} bytes before size_bytes={self._size_bytes}")
        self._left -= len(data)
        return data
