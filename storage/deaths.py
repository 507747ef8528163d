"""Deaths of workers: how one is told from its exit, and what follows in the journal.

What always holds: a death frees everything that the worker held, in one transaction, whether it is noted once or often,
by its supervisor, by its own watchdog, or by whoever takes its runs over; and the epochs are raised, so that a worker
wrongly thought dead cannot commit any more. What deaths are held against, and how much, is `suspects.py`.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sqlalchemy import Connection

from storage import claims, journal, leases, replays, workers
from storage.suspects import Cause

__all__ = ["Cause", "Freed", "cause_of_exit", "count_oom_kills", "note_death"]

_HANDS = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
UNSEEN_EXIT_STATUS = 75
"""Exit status of a worker that ended itself because it could reach neither database nor object store for too long."""


@dataclass(frozen=True)
class Freed:
    """What a dead worker had: runs and samples, which anybody may take now."""

    runs: Sequence[str]
    num_samples: int


def note_death(tx: Connection, worker_id: str, cause: Cause, *, now: datetime) -> Freed:
    """Free everything a worker held, and hold its death against what it was executing.

    The training operations that it had begun become suspects; if there were none, the samples that it had claimed and
    the run that it was replaying; that run alone if nothing else had its turn. (One thread steps either the one or the
    others: samples that wait for a training pass to end are innocent.)
    """
    runs = leases.release_worker(tx, worker_id)
    num_training = journal.put_back(tx, worker_id=worker_id, cause=cause)
    replayed_alone = replays.note_end(tx, runs, Cause.STOPPED if num_training else cause)
    of_samples = Cause.STOPPED if num_training or any(replayed_alone) else cause
    num_samples = claims.release_claims(
        tx, now=now, worker_id=worker_id, cause=of_samples, had_company=bool(replayed_alone)
    )
    workers.record_stopped(tx, worker_id, ended_by=cause, now=now)
    return Freed(runs, num_samples)


def cause_of_exit(returncode: int, *, oom_kills_before: int, oom_kills_now: int) -> Cause:
    """How a process ended that nobody asked to.

    Args:
        returncode: as `subprocess` gives it: negative for a signal.
        oom_kills_before, oom_kills_now: `count_oom_kills()` while the process lived, and after its end.
    """
    if returncode == 0:
        return Cause.STOPPED
    if returncode == UNSEEN_EXIT_STATUS:
        return Cause.UNKNOWN
    if returncode == -signal.SIGKILL and oom_kills_now > oom_kills_before:
        return Cause.OUT_OF_MEMORY
    return Cause.HAND if -returncode in _HANDS else Cause.FAULT


def count_oom_kills(root: Path = Path("/")) -> int:
    """Processes that the kernel has killed for want of memory: in this control group, or anywhere if it is the root.

    Args:
        root: where `proc` and `sys` are; without them (other systems than Linux) the count stays 0.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst (memory.events), cgroup-v1/memory.rst, proc(5) (vmstat).
    """
    for file in (*_files_of_control_group(root), root / "proc/vmstat"):
        with contextlib.suppress(OSError, ValueError):
            for line in file.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
    return 0


def _files_of_control_group(root: Path) -> Iterable[Path]:
    """Where the kernel counts for this process's control group, of either version."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield root / "sys/fs/cgroup" / path.lstrip("/") / "memory.events"
            elif "memory" in controllers.split(","):
                yield root / "sys/fs/cgroup/memory" / path.lstrip("/") / "memory.oom_control"
