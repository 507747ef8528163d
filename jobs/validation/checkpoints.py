"""Names, lifetimes and metadata of checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping

from jobs.operations import SaveExternal, SaveForSampler, SaveState
from jobs.validation.errors import InvalidOperationError
from jobs.validation.numbers import check_integer

NAME_MAX = 128
TTL_MIN_S = 3600
TTL_MAX_S = 3653 * 86_400
METADATA_MAX = 64
METADATA_TEXT_MAX = 1024
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+@:-]*", re.ASCII)


def check_save(body: SaveState | SaveForSampler | SaveExternal) -> None:
    """Refuse a save whose name, lifetime or metadata cannot be kept."""
    if body.name is not None:
        check_name(body.name)
    if body.ttl_s is not None:
        check_ttl(body.ttl_s)
    if not isinstance(body, SaveExternal):
        check_metadata(body.user_metadata)


def check_name(name: str) -> None:
    """Refuse a name that cannot be part of a `tinker://` path."""
    if len(name) > NAME_MAX or not _NAME.fullmatch(name):
        raise InvalidOperationError(
            f"path: {name[: NAME_MAX + 1]!r} is not a checkpoint name; it must be 1 to {NAME_MAX} characters of"
            " A-Z a-z 0-9 . _ = + @ : - and begin with a letter, a digit or _"
        )


def check_ttl(ttl_s: int) -> None:
    """Refuse a lifetime below an hour or above ten years."""
    check_integer(ttl_s, "ttl_seconds", TTL_MIN_S, TTL_MAX_S)


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Refuse metadata that is more than notes."""
    check_integer(len(metadata), "user_metadata: number of pairs", 0, METADATA_MAX)
    for key, value in metadata.items():
        if len(key) > METADATA_TEXT_MAX or len(value) > METADATA_TEXT_MAX:
            raise InvalidOperationError(
                f"user_metadata[{key[:40]!r}]: keys and values may have {METADATA_TEXT_MAX} characters"
            )
