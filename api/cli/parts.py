"""`piecework api | worker | scheduler`: one part alone, for deployments where something else supervises."""

from __future__ import annotations

from pathlib import Path

import click

from api.cli.options import data_dir_option
from api.cli.serve import exec_part


@click.command()
@click.option("--host", envvar="PIECEWORK_HOST", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=int, envvar="PIECEWORK_PORT", help="Port to listen on.  [default: 8787]")
@data_dir_option
def api(host: str | None, port: int | None, data_dir: Path) -> None:
    """Run one api process. It keeps nothing, so any number may run beside each other."""
    _become("api", data_dir, PIECEWORK_HOST=host, PIECEWORK_PORT=port)


@click.command()
@data_dir_option
@click.option("--device", envvar="PIECEWORK_DEVICE", help="cpu, cuda:0 …; auto takes cuda:0 where there is one.")
@click.option("--threads", type=int, envvar="PIECEWORK_THREADS", help="CPU threads of torch; 0: what torch chooses.")
@click.option("--worker-id", envvar="PIECEWORK_WORKER_ID", help="Name in leases and usage records; must be unique.")
def worker(data_dir: Path, device: str | None, threads: int | None, worker_id: str | None) -> None:
    """Run one worker process, for one device. It keeps nothing, so any number may run beside each other."""
    _become("worker", data_dir, PIECEWORK_DEVICE=device, PIECEWORK_THREADS=threads, PIECEWORK_WORKER_ID=worker_id)


@click.command()
@data_dir_option
def scheduler(data_dir: Path) -> None:
    """Run the scheduler: sweeps, expiry, closings. A second one waits until the first is gone."""
    _become("jobs.scheduler", data_dir)


def _become(module: str, data_dir: Path, **variables: str | int | None) -> None:
    given = {name: str(value) for name, value in variables.items() if value is not None}
    exec_part(module, {"PIECEWORK_DATA_DIR": str(data_dir), **given})
