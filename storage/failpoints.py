"""Failpoints: named places where a test may kill or hold up a real process. In service they do nothing.

`PIECEWORK_FAILPOINTS` names a directory. A file there, named as a point, arms it; of all processes that come by, the
first takes the file away and does what it says: `kill` (SIGKILL), `stop` (SIGSTOP, until somebody sends SIGCONT),
`pause SECONDS`. A file named `<point>@<pid>` is for that process alone. What fired is left as `<point>.fired-<pid>`.

Source of the idea: the failpoints of FreeBSD (fail(9)) and TiKV (fail-rs).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from enum import StrEnum
from pathlib import Path

VARIABLE = "PIECEWORK_FAILPOINTS"


class Point(StrEnum):
    """Every place there is: before and after each write that another process can see."""

    UPLOAD_BEGUN = "upload-begun"
    UPLOAD_ANNOUNCED = "upload-announced"
    UPLOAD_PUT = "upload-put"
    ROW_BEGUN = "row-begun"
    ROW_WRITTEN = "row-written"
    ACCEPTED = "accepted"
    MESSAGE_BEGUN = "message-begun"
    MESSAGE_SENT = "message-sent"
    TASK_BEGUN = "task-begun"
    TASK_DONE = "task-done"
    LEASE_BEGUN = "lease-begun"
    LEASE_TAKEN = "lease-taken"
    STATE_FETCHED = "state-fetched"
    TAIL_REPLAYED = "tail-replayed"
    LEASES_RENEWED = "leases-renewed"
    TURN_BEGUN = "turn-begun"
    TURN_STARTED = "turn-started"
    TURN_COMPUTED = "turn-computed"
    COMMIT_WRITTEN = "commit-written"
    COMMITTED = "committed"
    OUTCOMES_TOLD = "outcomes-told"
    CLAIM_BEGUN = "claim-begun"
    CLAIMED = "claimed"
    SAMPLES_DRAWN = "samples-drawn"
    SAMPLE_COMMIT_WRITTEN = "sample-commit-written"
    SAMPLES_COMMITTED = "samples-committed"
    SNAPSHOT_BEGUN = "snapshot-begun"
    SNAPSHOT_PUT = "snapshot-put"
    SNAPSHOT_NAMED = "snapshot-named"
    LEASE_RELEASED = "lease-released"
    OUTCOMES_EXPIRED = "outcomes-expired"
    OBJECTS_DOOMED = "objects-doomed"
    OBJECTS_DELETED = "objects-deleted"
    OBJECTS_FORGOTTEN = "objects-forgotten"
    STALLED_FOUND = "stalled-found"
    STALLED_ANNOUNCED = "stalled-announced"


def _directory() -> Path | None:
    value = os.environ.get(VARIABLE)
    return Path(value) if value else None


_armed_in = _directory()


def reach(point: Point) -> None:
    """Say that the process has come to a place. Nothing happens unless a test has armed it."""
    if _armed_in is not None:
        _fire(_armed_in, point)


def _fire(directory: Path, point: Point) -> None:
    taken = directory / f"{point}.fired-{os.getpid()}"
    for name in (f"{point}@{os.getpid()}", point):
        with contextlib.suppress(FileNotFoundError):
            (directory / name).rename(taken)  # of several processes one succeeds
            _do(taken.read_text().strip())


def _do(order: str) -> None:
    action, _, argument = order.partition(" ")
    if action == "pause":
        time.sleep(float(argument))
    else:
        # To this thread: a signal to the process may reach another one first, and this one would go on for a moment.
        signal.pthread_kill(threading.get_ident(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[action])
