"""Which object store a URL means.

    file:///var/lib/piecework/objects                 a directory; `?fsync=false` where a loss of power is no concern
    s3://ACCESS:SECRET@host:9000/bucket               MinIO or any S3
    s3://host:9000/bucket/prefix?secure=false         below a prefix, without TLS, credentials from the environment

Options of s3: `secure`, `region`, `create` (make the bucket), `signed_urls` (whether clients may fetch from the server
directly), `public_endpoint` (its URL as clients reach it), `retries`. Credentials with characters such as `/` or `+`
are percent-encoded, or given as PIECEWORK_S3_ACCESS_KEY and PIECEWORK_S3_SECRET_KEY.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from storage.errors import InvalidObjectKeyError, ObjectStoreRefusedError
from storage.keys import check_key
from storage.local import LocalObjectStore
from storage.objects import ObjectStore
from storage.s3 import S3ObjectStore
from storage.s3_client import S3Location

ACCESS_KEY_VARIABLE = "PIECEWORK_S3_ACCESS_KEY"
SECRET_KEY_VARIABLE = "PIECEWORK_S3_SECRET_KEY"  # noqa: S105, the name of a variable

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX_BYTES_MAX = 100
_FILE_OPTIONS = frozenset({"fsync"})
_S3_OPTIONS = frozenset({"secure", "region", "create", "signed_urls", "public_endpoint", "retries"})


def open_object_store(url: str, environment: Mapping[str, str] = os.environ) -> ObjectStore:
    """Open the object store that a URL means.

    Args:
        url: see this module.
        environment: where S3 credentials are looked up that the URL does not hold.

    Returns:
        the store. An S3 server is not asked anything yet, unless `create=true`.

    Raises:
        ObjectStoreRefusedError: the URL is wrong, with what to change; its secret is not in the message.
        ObjectStoreUnavailableError: `create=true` and the server does not answer.
    """
    parts = _split(url)
    if parts.scheme == "file":
        options = _options(url, parts, _FILE_OPTIONS)
        return LocalObjectStore(_directory(url, parts), fsync=_flag(url, options, "fsync", default=True))
    return S3ObjectStore(s3_location(url, environment))


def s3_location(url: str, environment: Mapping[str, str] = os.environ) -> S3Location:
    """Read an `s3://` URL.

    Raises:
        ObjectStoreRefusedError: it is wrong, with what to change.
    """
    parts = _split(url)
    options = _options(url, parts, _S3_OPTIONS)
    bucket, _, prefix = unquote(parts.path).strip("/").partition("/")
    if parts.scheme != "s3" or not parts.hostname or not _BUCKET.fullmatch(bucket):
        raise _refused(url, "it has the form s3://host:port/bucket, with a valid bucket name")
    access_key, secret_key = _credentials(url, parts, environment)
    return S3Location(
        endpoint=parts.netloc.rpartition("@")[2],
        bucket=bucket,
        prefix=_checked_prefix(url, prefix),
        access_key=access_key,
        secret_key=secret_key,
        secure=_flag(url, options, "secure", default=True),
        region=options.get("region", "us-east-1"),
        create=_flag(url, options, "create", default=False),
        public_endpoint=_public_endpoint(url, options),
        signed_urls=_flag(url, options, "signed_urls", default=True),
        num_retries=_count(url, options, "retries", default=4),
    )


def redact(url: str) -> str:
    """Return the URL without its credentials, for logs and people; also where it is not a valid one."""
    scheme, separator, rest = url.partition("://")
    if scheme == "file":
        return url
    return f"{scheme}{separator}{rest.rpartition('@')[2]}" if separator else url.rpartition("@")[2]


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise _refused(url, "host or port is malformed; percent-encode / ? # @ in credentials") from None
    if parts.scheme not in {"file", "s3"}:
        raise _refused(url, "it begins with neither file:// nor s3://")
    if parts.fragment:
        raise _refused(url, "it holds a #; percent-encode it as %23")
    return parts


def _options(url: str, parts: SplitResult, known: frozenset[str]) -> dict[str, str]:
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := options.keys() - known:
        raise _refused(url, f"unknown options {sorted(unknown)}; there are {sorted(known)}")
    if empty := sorted(name for name, value in options.items() if not value):
        raise _refused(url, f"{empty[0]} is empty")
    return options


def _directory(url: str, parts: SplitResult) -> Path:
    if parts.netloc not in {"", "localhost"} or not parts.path.strip("/"):
        raise _refused(url, "a directory is named by its absolute path, file:///path")
    return Path(unquote(parts.path))


def _credentials(url: str, parts: SplitResult, environment: Mapping[str, str]) -> tuple[str, str]:
    access_key = unquote(parts.username or "") or environment.get(ACCESS_KEY_VARIABLE, "")
    secret_key = unquote(parts.password or "") or environment.get(SECRET_KEY_VARIABLE, "")
    if not access_key or not secret_key:
        places = f"as s3://ACCESS:SECRET@host, or as {ACCESS_KEY_VARIABLE} and {SECRET_KEY_VARIABLE}"
        raise _refused(url, f"credentials are missing: give them {places}")
    return access_key, secret_key


def _checked_prefix(url: str, prefix: str) -> str:
    if not prefix:
        return ""
    try:
        check_key(prefix)
    except InvalidObjectKeyError as error:
        raise _refused(url, f"the prefix after the bucket: {error.reason}") from error
    if len(prefix) > _PREFIX_BYTES_MAX:
        raise _refused(url, f"the prefix after the bucket is longer than {_PREFIX_BYTES_MAX} characters")
    return prefix


def _public_endpoint(url: str, options: Mapping[str, str]) -> str | None:
    endpoint = options.get("public_endpoint")
    if endpoint is None:
        return None
    parts = urlsplit(endpoint)
    if parts.scheme not in {"http", "https"} or not parts.netloc or parts.path.strip("/"):
        raise _refused(url, "public_endpoint has the form https://host:port")
    return endpoint


def _flag(url: str, options: Mapping[str, str], name: str, *, default: bool) -> bool:
    value = options.get(name, str(default).lower())
    if value not in {"true", "false"}:
        raise _refused(url, f"{name} is true or false, not {value!r}")
    return value == "true"


def _count(url: str, options: Mapping[str, str], name: str, *, default: int) -> int:
    value = options.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,2}", value):
        raise _refused(url, f"{name} is a number from 0 to 99, not {value!r}")
    return int(value)


def _refused(url: str, reason: str) -> ObjectStoreRefusedError:
    return ObjectStoreRefusedError(redact(url).partition("?")[0], reason)
