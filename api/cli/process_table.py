"""`processes.json` in the data directory: which processes of the embedded service run, for `piecework status`.

A process id alone may have been given to another program since, so each is kept with its time of creation and shown
only while both match. The file appears whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from storage.atomic_file import whole_file

FILE_NAME = "processes.json"
_SAME_START_S = 1.0


@dataclass(frozen=True)
class ProcessEntry:
    """One running process; `created_at` in seconds since 1970, as the kernel tells it."""

    role: str
    pid: int
    created_at: float


def entry(role: str, pid: int) -> ProcessEntry | None:
    """The entry of a process that runs now; None if it is gone."""
    try:
        return ProcessEntry(role, pid, psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return None


def write(data_dir: Path, url: str, entries: Sequence[ProcessEntry]) -> None:
    """Replace the table."""
    table = {"url": url, "processes": [asdict(one) for one in entries]}
    with whole_file(data_dir / FILE_NAME, fsync=False) as file:
        file.write(json.dumps(table).encode())


def read(data_dir: Path) -> list[ProcessEntry]:
    """The processes of the table that still run."""
    try:
        table = json.loads((data_dir / FILE_NAME).read_bytes())
    except FileNotFoundError:
        return []
    return [one for one in (ProcessEntry(**row) for row in table["processes"]) if _runs(one)]


def find_url(data_dir: Path) -> str | None:
    """Where the running service listens."""
    try:
        table = json.loads((data_dir / FILE_NAME).read_bytes())
    except FileNotFoundError:
        return None
    url: str = table["url"]
    return url


def remove(data_dir: Path) -> None:
    """Nothing runs any more."""
    (data_dir / FILE_NAME).unlink(missing_ok=True)


def _runs(one: ProcessEntry) -> bool:
    try:
        process = psutil.Process(one.pid)
        same = abs(process.create_time() - one.created_at) < _SAME_START_S
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
