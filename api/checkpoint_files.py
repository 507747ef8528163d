"""Links to a checkpoint's files, to its archive, and what lies behind the links that we sign ourselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from email.utils import format_datetime
from typing import Any

from fastapi.responses import Response, StreamingResponse

from api import downloads
from api.errors import BadRequestError, NotFoundError
from api.services import Services
from storage import checkpoints
from storage.checkpoints import Checkpoint
from storage.ids import CheckpointPath

FILE_ROUTE = "/api/v1/files"
ARCHIVE_ROUTE = "/api/v1/archives"


def links(services: Services, account_id: str, path: CheckpointPath, *, base_url: str) -> dict[str, Any]:
    """`urls` by file name, and when they expire.

    Raises:
        RowNotFoundError: there is no such checkpoint that the account may read.
        BadRequestError: it holds no files to download.
    """
    checkpoint, expires_at = _downloadable(services, account_id, path)
    urls = {name: _link(services, file["key"], name, expires_at, base_url) for name, file in checkpoint.files.items()}
    return {"urls": urls, "expires": expires_at.isoformat()}


def archive_redirect(services: Services, account_id: str, path: CheckpointPath, *, base_url: str) -> Response:
    """302 to a signed link to the archive.

    Raises:
        RowNotFoundError, BadRequestError: as of `links`.
    """
    _, expires_at = _downloadable(services, account_id, path)
    location = f"{_root(services, base_url)}{ARCHIVE_ROUTE}/{services.signer.path(str(path), expires_at)}"
    headers = {"Location": location, "Expires": format_datetime(expires_at, usegmt=True)}
    return Response(status_code=302, headers=headers)


def file(services: Services, expiry: int, signature: str, key: str) -> Response:
    """The object behind a link of ours.

    Raises:
        NotFoundError: the link is not ours, or its time is over.
    """
    _check_link(services, key, expiry, signature)
    objects = services.storage.objects
    headers = {"Content-Length": str(objects.stat(key).size_bytes)}
    return StreamingResponse(objects.stream(key), headers=headers, media_type="application/octet-stream")


def archive(services: Services, expiry: int, signature: str, subject: str) -> Response:
    """The archive behind a link of ours.

    Raises:
        NotFoundError: the link is not ours, its time is over, or the checkpoint is gone.
    """
    now = _check_link(services, subject, expiry, signature)
    with services.database.read() as tx:
        checkpoint = checkpoints.find(tx, CheckpointPath.parse(subject), now=now)
    if checkpoint is None:
        raise NotFoundError("the checkpoint is gone")
    name = checkpoint.name.encode("ascii", "replace").decode()
    headers = {
        "Content-Length": str(downloads.archive_bytes(checkpoint.files)),
        "Content-Disposition": f'attachment; filename="{name}.tar"',
    }
    return StreamingResponse(_pieces(services, checkpoint.files), headers=headers, media_type="application/x-tar")


def _pieces(services: Services, files: Mapping[str, Mapping[str, Any]]) -> Iterator[bytes]:
    yield from downloads.archive(services.storage.objects, files)


def _downloadable(services: Services, account_id: str, path: CheckpointPath) -> tuple[Checkpoint, datetime]:
    with services.database.read() as tx:
        now = services.database.now(tx)
        checkpoint = checkpoints.get(tx, path, now=now, reader=account_id)
    if not checkpoint.files:
        raise BadRequestError(
            f"{path} holds no files to download; load it into a training client and save it with save_weights_external"
        )
    return checkpoint, (now + timedelta(seconds=services.settings.signed_url_s)).replace(microsecond=0)


def _link(services: Services, key: str, name: str, expires_at: datetime, base_url: str) -> str:
    signed = services.storage.objects.signed_url(key, expires_s=services.settings.signed_url_s)
    if signed is not None:
        return signed
    return f"{_root(services, base_url)}{FILE_ROUTE}/{services.signer.path(key, expires_at)}?name={name}"


def _root(services: Services, base_url: str) -> str:
    return (services.settings.public_url or base_url).rstrip("/")


def _check_link(services: Services, subject: str, expiry: int, signature: str) -> datetime:
    with services.database.read() as tx:
        now = services.database.now(tx)
    if not services.signer.is_valid(subject, expiry, signature, now=now):
        raise NotFoundError("the link is not valid (any more); ask for a new one")
    return now
