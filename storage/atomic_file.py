"""Files that appear whole or not at all.

The bytes go to a scratch file that the writer holds locked; a rename puts it in place. A scratch file whose writer
died is told by its missing lock, whatever machine clock or process id says, and `clean_scratch` deletes it.
"""

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

SCRATCH_PREFIX = ".unfinished-"
_LOCKED_WITHIN_S = 60.0  # a file this young may be just before its lock
_PUBLISH_TRIES = 100


@contextlib.contextmanager
def whole_file(path: Path, *, scratch: Path | None = None, fsync: bool = True) -> Iterator[BinaryIO]:
    """Write a file that nobody sees before it is complete.

    Args:
        path: where it appears when the block ends; over a file that was there. Missing parents are made.
        scratch: existing directory on the same file system for the unfinished file; default: beside `path`.
        fsync: whether it outlives a loss of power, not only of the process.

    Yields:
        the open file to write to. If the block raises, nothing of it remains.
    """
    made: list[Path] = []
    if scratch is None:
        made += _make_directory(path.parent)
    directory = scratch or path.parent
    unfinished = directory / f"{SCRATCH_PREFIX}{secrets.token_hex(12)}"
    with unfinished.open("xb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            file.flush()
            if fsync:
                os.fsync(file.fileno())
            made += _publish(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
    if fsync:
        for changed in {path.parent, *(directory.parent for directory in made)}:
            _fsync_directory(changed)


def clean_scratch(directory: Path) -> int:
    """Delete the unfinished files of writers that no longer live.

    Returns:
        how many there were.
    """
    num_deleted = 0
    for path in directory.glob(f"{SCRATCH_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
            if time.time() - path.stat().st_mtime < _LOCKED_WITHIN_S:
                continue
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            num_deleted += 1
    return num_deleted


def _make_directory(directory: Path) -> list[Path]:
    """Make a directory and its parents; return those that were missing."""
    missing = [parent for parent in (directory, *directory.parents) if not parent.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return missing


def _publish(unfinished: Path, path: Path) -> list[Path]:
    """Rename into place. Whoever deletes a directory's last file removes the directory, so it may have to come back."""
    made: list[Path] = []
    for _ in range(_PUBLISH_TRIES):
        try:
            os.replace(unfinished, path)
        except FileNotFoundError:
            if not unfinished.exists():
                raise
        else:
            return made
        with contextlib.suppress(FileNotFoundError, FileExistsError):  # removed while it was made
            made += _make_directory(path.parent)
    raise FileNotFoundError(f"{path.parent} is removed as often as it is made")


def _fsync_directory(directory: Path) -> None:
    """A directory that was removed meanwhile held nothing to keep."""
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
