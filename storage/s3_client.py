"""How an S3 server is reached: where, as whom, with how much patience."""

import os
from dataclasses import dataclass, field

import certifi
import urllib3
from minio import Minio

_NUM_CONNECTIONS = 32
CONNECT_S = 3.0
ANSWER_S = 20.0
"""Silence of a server in the middle of a request, or before its answer."""
NUM_SILENCES_MAX = 1
"""So often a request is repeated to a server that was silent: whoever waits for it would give up after 60 s."""


@dataclass(frozen=True, slots=True)
class S3Location:
    """Where a bucket is and how to get in.

    Attributes:
        endpoint: `host` or `host:port`.
        bucket: its name.
        prefix: what all keys of ours begin with in the bucket, without slashes at its ends; may be empty.
        access_key: name of the credential.
        secret_key: its secret; never shown.
        secure: whether over TLS.
        region: of the bucket; most servers other than AWS ignore it.
        create: whether to make the bucket when it is missing.
        public_endpoint: URL of the same server as clients reach it, for signed URLs; default: `endpoint`.
        signed_urls: whether clients may fetch from the server at all; otherwise the api serves objects itself.
        num_retries: how often a request is repeated after a broken connection or a 5xx.
    """

    endpoint: str
    bucket: str
    prefix: str = ""
    access_key: str = ""
    secret_key: str = field(default="", repr=False)
    secure: bool = True
    region: str = "us-east-1"
    create: bool = False
    public_endpoint: str | None = None
    signed_urls: bool = True
    num_retries: int = 4

    def __str__(self) -> str:
        return f"s3://{self.endpoint}/{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")


def make_pool(location: S3Location) -> urllib3.PoolManager:
    """Return connections that many threads share, with bounded time and bounded, jittered repetition.

    Every request of ours may be repeated: objects are immutable, and deleting twice is deleting once.
    """
    retries = urllib3.Retry(
        total=location.num_retries,
        read=min(NUM_SILENCES_MAX, location.num_retries),
        backoff_factor=0.2,
        backoff_jitter=0.2,
        backoff_max=5,
        status_forcelist=(429, 500, 502, 503, 504),
        respect_retry_after_header=False,  # it may ask for an hour
        allowed_methods=None,
        raise_on_status=False,
    )
    return urllib3.PoolManager(
        timeout=urllib3.Timeout(connect=CONNECT_S, read=ANSWER_S),
        maxsize=_NUM_CONNECTIONS,
        retries=retries,
        cert_reqs="CERT_REQUIRED",
        ca_certs=os.environ.get("SSL_CERT_FILE") or certifi.where(),
    )


def make_client(location: S3Location, endpoint: str, *, secure: bool, pool: urllib3.PoolManager) -> Minio:
    """Return a client for an endpoint of the location's server, with the location's credentials."""
    return Minio(
        endpoint,
        access_key=location.access_key or None,
        secret_key=location.secret_key or None,
        secure=secure,
        region=location.region,
        http_client=pool,
    )
