"""What lies behind the links that we sign: no key is asked for, the signature is the permission."""

from __future__ import annotations

from fastapi import APIRouter, Response

from api import checkpoint_files
from api.dependencies import Joined

router = APIRouter()


@router.get(checkpoint_files.FILE_ROUTE + "/{expiry}/{signature}/{key:path}")
def get_file(services: Joined, expiry: int, signature: str, key: str) -> Response:
    """One file of a checkpoint."""
    return checkpoint_files.file(services, expiry, signature, key)


@router.get(checkpoint_files.ARCHIVE_ROUTE + "/{expiry}/{signature}/{subject:path}")
def get_archive(services: Joined, expiry: int, signature: str, subject: str) -> Response:
    """All files of a checkpoint as a tar."""
    return checkpoint_files.archive(services, expiry, signature, subject)
