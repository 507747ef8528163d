"""URLs of object stores: what they mean, and that their secret stays in them."""

from pathlib import Path

import pytest

from storage.errors import ObjectStoreRefusedError
from storage.local import LocalObjectStore
from storage.object_url import open_object_store, redact, s3_location


def test_a_file_url_is_a_directory(tmp_path: Path) -> None:
    # Given a name that has to be percent-encoded
    directory = tmp_path / "a b#c"
    # When
    store = open_object_store(directory.as_uri() + "?fsync=false")
    store.put("x", b"1")
    # Then
    assert isinstance(store, LocalObjectStore)
    assert (directory / "x").read_bytes() == b"1"


def test_an_s3_url_is_read_in_full() -> None:
    # When
    location = s3_location(
        "s3://AK:s%2Fe%2Bcret@minio:9000/bucket/pre/fix?secure=false&region=eu-1&create=true&signed_urls=false"
        "&public_endpoint=https://files.example:8443&retries=2",
        {},
    )
    # Then
    assert (location.endpoint, location.bucket, location.prefix) == ("minio:9000", "bucket", "pre/fix")
    assert (location.access_key, location.secret_key) == ("AK", "s/e+cret")
    assert (location.secure, location.region, location.create) == (False, "eu-1", True)
    assert (location.public_endpoint, location.signed_urls) == ("https://files.example:8443", False)
    assert location.num_retries == 2


def test_the_safe_choices_are_the_defaults() -> None:
    # When
    location = s3_location("s3://AK:secret@s3.example/bucket", {})
    # Then
    assert location.secure
    assert not location.create
    assert location.prefix == ""


def test_credentials_may_come_from_the_environment() -> None:
    # When
    location = s3_location(
        "s3://host/bucket", {"PIECEWORK_S3_ACCESS_KEY": "AK", "PIECEWORK_S3_SECRET_KEY": "from-outside"}
    )
    # Then
    assert (location.access_key, location.secret_key) == ("AK", "from-outside")


def test_a_store_never_shows_its_secret() -> None:
    # Given
    url = "s3://AK:hunter2@127.0.0.1:9/bucket"
    # Then
    assert "hunter2" not in repr(open_object_store(url))
    assert "hunter2" not in repr(s3_location(url))
    assert "hunter2" not in str(s3_location(url))


@pytest.mark.parametrize(
    ("url", "what_to_change"),
    [
        ("", "begins with neither"),
        ("/var/objects", "begins with neither"),
        ("ftp://AK:hunter2@host/bucket", "begins with neither"),
        ("file://relative/path", "absolute path"),
        ("file:///", "absolute path"),
        ("file:///tmp/x?fsync=maybe", "fsync is true or false"),
        ("file:///tmp/x?fsnyc=true", "unknown options"),
        ("s3://AK:hunter2@host", "s3://host:port/bucket"),
        ("s3://AK:hunter2@host/Bad_Bucket", "valid bucket name"),
        ("s3://AK:hunter2@host:port/bucket", "malformed"),
        ("s3://AK:hunter2/x@host/bucket", "malformed"),
        ("s3://AK:hunter2@host/bucket/../up", "prefix after the bucket"),
        ("s3://AK:hunter2@host/bucket/" + "p" * 101, "longer than 100"),
        ("s3://AK:hunter2@host/bucket?region=", "region is empty"),
        ("s3://AK:hunter2@host/bucket?secure=no", "secure is true or false"),
        ("s3://AK:hunter2@host/bucket?retries=-1", "retries is a number"),
        ("s3://AK:hunter2@host/bucket?public_endpoint=files.example", "public_endpoint has the form"),
        ("s3://AK:hunter2@host/bucket#x", "percent-encode"),
        ("s3://AK@host/bucket", "PIECEWORK_S3_SECRET_KEY"),
        ("s3://host/bucket", "PIECEWORK_S3_ACCESS_KEY"),
    ],
)
def test_a_wrong_url_is_refused_with_what_to_change_and_without_its_secret(url: str, what_to_change: str) -> None:
    with pytest.raises(ObjectStoreRefusedError, match=what_to_change) as raised:
        open_object_store(url, {})
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://AK:hunter2@host:9000/bucket?secure=false", "s3://host:9000/bucket?secure=false"),
        ("s3://AK:hun/ter@2@host/bucket", "s3://host/bucket"),
        ("postgresql+psycopg://me:hunter2@db/piecework", "postgresql+psycopg://db/piecework"),
        ("AK:hunter2@host/bucket", "host/bucket"),
        ("s3://host/bucket", "s3://host/bucket"),
        ("file:///home/a@b/objects", "file:///home/a@b/objects"),
    ],
)
def test_a_redacted_url_holds_no_credentials(url: str, shown: str) -> None:
    assert redact(url) == shown
