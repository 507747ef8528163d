"""`piecework serve`: the embedded service, one command and no servers."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import logging.handlers
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from api.cli import process_table
from api.cli.broker import broker_spec
from api.cli.child import ChildSpec
from api.cli.child_log import BYTES_MAX, NUM_OLD
from api.cli.errors import CliError
from api.cli.options import PORT, data_dir_option
from api.cli.process import python
from api.cli.settings_check import check_settings
from api.cli.supervisor import Running, Supervisor
from api.cli.worker_child import DeadWorkers, forkserver_children, worker_child
from api.settings import ApiSettings, SupervisorSettings
from jobs.settings import JobsSettings
from storage.settings import StorageSettings
from storage.supervision import SUPERVISED
from storage.telemetry import set_up_logging

if TYPE_CHECKING:
    from api.cli.first_start import Prepared

LOCK_NAME = "supervisor.lock"
_LOCK_TRIES = 20
_HEALTH_TIMEOUT_S = 1.0


@click.command()
@click.option("--host", default=None, envvar="PIECEWORK_HOST", help="Address to listen on.  [default: 127.0.0.1]")
@click.option(
    "--port", type=PORT, default=None, envvar="PIECEWORK_PORT", help="Port; 0 takes a free one.  [default: 8787]"
)
@data_dir_option
@click.option(
    "--device",
    "devices",
    multiple=True,
    help="cpu, cuda:0 …; auto takes cuda:0 where there is one. Give it several times for a worker on each.",
)
@click.option(
    "--grace", "grace_s", type=float, default=20.0, show_default=True, help="Seconds that running steps get to end."
)
def serve(host: str | None, port: int | None, data_dir: Path, devices: tuple[str, ...], grace_s: float) -> None:
    """Run the whole service on this machine: api, worker, scheduler and broker under one supervisor.

    The first start makes an account and prints an API key. What dies is started again; Ctrl-C stops everything. With
    PIECEWORK_DATABASE_URL, PIECEWORK_BROKER_URL or PIECEWORK_OBJECT_STORE_URL the same code uses those servers.
    """
    check_settings()
    api_settings = ApiSettings()
    host = host or api_settings.host
    data_dir.mkdir(parents=True, exist_ok=True)
    with _only_one(data_dir):
        port = _free_port(host, api_settings.port if port is None else port)
        url = f"http://{_reachable(host)}:{port}"
        settings = StorageSettings(data_dir=data_dir)
        dead_workers = DeadWorkers(settings, _say)
        specs = _specs(settings, host, port, devices, dead_workers)
        prepared = _prepare(settings)
        _greet(data_dir, url, prepared)
        supervisor = Supervisor(
            specs,
            grace_s=grace_s,
            say=_say,
            logs=_logs(data_dir),
            reaps_orphans=True,
            on_ready=lambda: _say(f"ready: {url}"),
            on_change=lambda running: _write_table(data_dir, url, running),
        )
        supervisor.run()
        dead_workers.finish()
        if supervisor.failed is not None:
            raise CliError(f"{supervisor.failed} could not start; what it said stands above and in {data_dir / 'logs'}")
        _say("stopped")


# ----------------------------------------------------------------------------------------------------------- processes


def _specs(
    settings: StorageSettings, host: str, port: int, devices: tuple[str, ...], dead_workers: DeadWorkers
) -> list[ChildSpec]:
    """Broker first, because the others wait for it."""
    jobs_settings = JobsSettings(data_dir=settings.data_dir)
    common = {"PIECEWORK_DATA_DIR": str(settings.data_dir), "PYTHONUNBUFFERED": "1"}
    api = {**common, "PIECEWORK_HOST": host, "PIECEWORK_PORT": str(port)}
    specs = []
    if not jobs_settings.broker_url:
        specs.append(broker_spec(settings.data_dir, jobs_settings.broker_socket()))
    specs.append(
        ChildSpec(
            "api",
            "api",
            (*python("api"), SUPERVISED),
            lambda: api,
            is_ready=lambda: _is_healthy(_reachable(host), port),
            speaks=True,
            forked=True,
            must_start=True,
        )
    )
    specs += forkserver_children(common, "api.__main__", wanted=SupervisorSettings().forkserver)
    for number, device in enumerate(devices or ("",)):
        variables = {**common, **({"PIECEWORK_DEVICE": device} if device else {})}
        specs.append(worker_child(f"worker-{number}", variables, dead_workers, must_start=True))
    specs.append(ChildSpec("scheduler", "scheduler", python("jobs.scheduler"), lambda: common))
    return specs


def _is_healthy(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host.strip("[]"), port, timeout=_HEALTH_TIMEOUT_S)
    try:
        connection.request("GET", "/api/v1/healthz")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _logs(data_dir: Path) -> Path:
    """The directory of all logs, with that of the supervisor's own events set up."""
    logs = data_dir / "logs"
    logs.mkdir(exist_ok=True)
    file = logging.handlers.RotatingFileHandler(logs / "supervisor.log", maxBytes=BYTES_MAX, backupCount=NUM_OLD)
    set_up_logging("supervisor", handler=file)
    return logs


def _write_table(data_dir: Path, url: str, running: Running) -> None:
    """Where the disk is full, the table of before stays."""
    with contextlib.suppress(OSError):
        if running:
            entries = [process_table.entry(role, pid) for role, pid in running]
            process_table.write(data_dir, url, [one for one in entries if one is not None])
        else:
            process_table.remove(data_dir)


# --------------------------------------------------------------------------------------------------------- preparation


@contextlib.contextmanager
def _only_one(data_dir: Path) -> Iterator[None]:
    """Hold the data directory; two supervisors on one would start everything twice."""
    with (data_dir / LOCK_NAME).open("ab") as lock:
        for attempt in range(_LOCK_TRIES):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == _LOCK_TRIES - 1:
                    pid = next((one.pid for one in process_table.read(data_dir) if one.role == "supervisor"), None)
                    who = f" (pid {pid})" if pid else ""
                    raise CliError(
                        f"another `piecework serve`{who} uses {data_dir}: stop it, or give another --data-dir"
                    ) from None
                time.sleep(0.05)
        yield


def _free_port(host: str, port: int) -> int:
    """The port, if it can be listened on; 0 becomes a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
        except OSError as error:
            message = f"cannot listen on {host}:{port} ({error.strerror}): choose another --port or --host"
            raise CliError(message) from error
        chosen: int = probe.getsockname()[1]
        return chosen


def _reachable(host: str) -> str:
    """The host as a client on this machine writes it."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104


def _prepare(settings: StorageSettings) -> Prepared:
    from api.cli.first_start import prepare
    from storage.database import Database

    database = Database(settings.resolved_database_url(), sqlite_synchronous=settings.sqlite_synchronous)
    try:
        return prepare(database)
    finally:
        database.close()


def _greet(data_dir: Path, url: str, prepared: Prepared) -> None:
    _say(f"piecework serves {data_dir} at {url} (logs: {data_dir / 'logs'})")
    if prepared.new_key:
        _say("account `default` and its API key are made. The key is shown now and never again. For the SDK:\n")
        _say(f"    export TINKER_BASE_URL={url}\n    export TINKER_API_KEY={prepared.new_key}\n")
    elif prepared.old_key:
        _say(f"API key {prepared.old_key}; make another: piecework keys create --account default")
    else:
        _say("no valid API key is left: piecework keys create --account NAME")
    if prepared.base_models:
        _say(f"base models: {', '.join(prepared.base_models)}")
    else:
        command = f"piecework models add starter --data-dir {data_dir}"
        _say(f"no base model yet: `{command}`, or a hub id or directory in place of starter; no restart is needed")


def _say(line: str) -> None:
    """A reader that went away, or a full disk, must not stop the service."""
    with contextlib.suppress(OSError, ValueError):
        print(line, flush=True)
