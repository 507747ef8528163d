"""`piecework api | worker | scheduler`: one part alone, for deployments where something else supervises."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import click

from api.cli.options import PORT, data_dir_option
from api.cli.process import python


@click.command()
@click.option("--host", envvar="PIECEWORK_HOST", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=PORT, envvar="PIECEWORK_PORT", help="Port to listen on.  [default: 8787]")
@data_dir_option
def api(host: str | None, port: int | None, data_dir: Path) -> None:
    """Run one api process. It keeps nothing, so any number may run beside each other."""
    _check()
    _become("api", _variables(data_dir, PIECEWORK_HOST=host, PIECEWORK_PORT=port))


@click.command()
@data_dir_option
@click.option("--device", envvar="PIECEWORK_DEVICE", help="cpu, cuda:0 …; auto takes cuda:0 where there is one.")
@click.option("--threads", type=int, envvar="PIECEWORK_THREADS", help="CPU threads of torch; 0: what torch chooses.")
@click.option("--worker-id", envvar="PIECEWORK_WORKER_ID", help="Name in leases and usage records; must be unique.")
@click.option(
    "--supervise/--no-supervise",
    default=None,
    help="Restart a worker that dies, at once; or be the worker process itself.  [default: supervise]",
)
def worker(
    data_dir: Path, device: str | None, threads: int | None, worker_id: str | None, supervise: bool | None
) -> None:
    """Run one worker, for one device. It keeps nothing, so any number may run beside each other.

    A small parent process restarts it when it dies, and hands on at once what it held. SIGTERM lets it finish its step.
    """
    _check()
    variables = _variables(data_dir, PIECEWORK_DEVICE=device, PIECEWORK_THREADS=threads)
    from api.settings import SupervisorSettings

    settings = SupervisorSettings()
    if settings.supervise_worker if supervise is None else supervise:
        from api.cli.supervised import supervise_worker

        sys.exit(supervise_worker(data_dir, variables, worker_name=worker_id or "", forkserver=settings.forkserver))
    _become("worker", variables | _variables(data_dir, PIECEWORK_WORKER_ID=worker_id))


@click.command()
@data_dir_option
def scheduler(data_dir: Path) -> None:
    """Run the scheduler: sweeps, expiry, closings. A second one waits until the first is gone."""
    _check()
    _become("jobs.scheduler", _variables(data_dir))


def _check() -> None:
    from api.cli.settings_check import check_settings

    check_settings()


def _variables(data_dir: Path, **values: str | int | None) -> dict[str, str]:
    given = {name: str(value) for name, value in values.items() if value is not None}
    return {"PIECEWORK_DATA_DIR": str(data_dir), **given}


def _become(module: str, environment: Mapping[str, str]) -> None:
    """Be a part: one process, so that signals and exit code are the part's own."""
    command = python(module)
    os.execve(command[0], command, {**os.environ, **environment})  # noqa: S606 (a fixed program, our own interpreter)
