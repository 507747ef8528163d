"""`piecework worker`: a small parent that restarts its worker, and hands on at once what a dead one held.

It reads no requests and keeps nothing. Output, SIGTERM and exit code are the worker's: for a container, an init system
or a person it is as if the worker itself ran there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import structlog

from api.cli.supervisor import Supervisor
from api.cli.worker_child import DeadWorkers, forkserver_children, worker_child
from storage.settings import StorageSettings
from storage.telemetry import set_up_logging

log = structlog.get_logger()

NO_LIMIT = float("inf")
SIGNAL_STATUS = 128


def supervise_worker(data_dir: Path, variables: Mapping[str, str], *, worker_name: str, forkserver: bool) -> int:
    """Run a worker until SIGTERM, SIGINT or SIGHUP; returns the exit status to end with.

    A stopping worker gets as long as it likes: whoever sent the signal decides when to send SIGKILL, which ends the
    worker with its parent; a second signal kills it at once. A worker that cannot even start ends the parent, too.
    """
    set_up_logging("supervisor")
    dead_workers = DeadWorkers(StorageSettings(data_dir=data_dir), lambda line: log.warning("not_freed", reason=line))
    worker = worker_child("worker", variables, dead_workers, worker_name=worker_name, must_start=True)
    specs = [*forkserver_children(variables, wanted=forkserver), worker]
    supervisor = Supervisor(specs, grace_s=NO_LIMIT, say=_told_by_events, logs=None, reaps_orphans=True)
    supervisor.run()
    dead_workers.finish()
    code = supervisor.children[-1].code or 0
    return code if code >= 0 else SIGNAL_STATUS - code


def _told_by_events(_line: str) -> None:
    """What the supervisor says to a person stands in its log lines too, and here is nobody else."""
