"""`piecework doctor`: what is reachable, what is not, and what to change."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import click
from sqlalchemy import Connection

from api.cli import broker, process_table
from api.cli.options import data_dir_option, json_option
from api.cli.output import print_json
from jobs.settings import JobsSettings
from storage import base_models, workers
from storage.database import Database
from storage.errors import StorageError
from storage.migrate import is_current
from storage.object_url import open_object_store, redact
from storage.settings import StorageSettings

T = TypeVar("T")

CONNECT_S = 3.0
DISK_BYTES_MIN = 2 * 2**30
TORCH_S = 120.0
TORCH_PROBE = """
import json, torch
cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps([torch.__version__, torch.get_num_threads(), cuda]))
"""


@dataclass(frozen=True)
class Finding:
    """One line: `state` is ok, note (works, but worth knowing) or fail (something cannot be reached)."""

    what: str
    state: str
    detail: str


@click.command()
@json_option
@data_dir_option
def doctor(as_json: bool, data_dir: Path) -> None:
    """Check database, broker, object store, disk, base models and device; exit with 1 if something is unreachable."""
    findings = []
    for finding in examine(data_dir):
        findings.append(finding)
        if not as_json:
            mark = {"ok": "ok  ", "note": "note", "fail": "FAIL"}[finding.state]
            click.echo(f"{mark} {finding.what:<13} {finding.detail}")
    if as_json:
        print_json({"findings": [asdict(finding) for finding in findings]})
    if any(finding.state == "fail" for finding in findings):
        sys.exit(1)


def examine(data_dir: Path) -> Iterator[Finding]:
    """Every check in turn; none needs the service to run, and none prints a secret."""
    settings = StorageSettings(data_dir=data_dir)
    jobs_settings = JobsSettings(data_dir=data_dir)
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("disk", lambda: _disk(data_dir)),
        ("database", lambda: _database(settings)),
        ("object store", lambda: _object_store(settings)),
        ("broker", lambda: _broker(jobs_settings)),
        ("base models", lambda: _base_models(settings)),
        ("state of runs", lambda: _state_of_runs(settings)),
        ("service", lambda: _service(data_dir)),
        ("device", _device),
    ]
    for what, check in checks:
        try:
            yield check()
        except (StorageError, OSError) as error:
            yield Finding(what, "fail", str(error))


def _disk(data_dir: Path) -> Finding:
    there = next(place for place in (data_dir, *data_dir.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Finding("disk", "fail", f"{data_dir} cannot be written in: {there} is no directory, or not writable")
    free = shutil.disk_usage(there).free
    detail = f"{free / 2**30:.1f} GiB free at {there}"
    if free < DISK_BYTES_MIN:
        return Finding("disk", "note", f"{detail}: free some, or choose another --data-dir")
    return Finding("disk", "ok", detail)


def _database(settings: StorageSettings) -> Finding:
    if not settings.has_database():
        return Finding("database", "note", f"none in {settings.data_dir} yet: the first start makes it")
    database = Database(settings.resolved_database_url(), sqlite_synchronous=settings.sqlite_synchronous)
    try:
        current = is_current(database)
    finally:
        database.close()
    if not current:
        return Finding("database", "note", f"{database.url_without_password}: its tables are made by the next start")
    return Finding("database", "ok", database.url_without_password)


def _object_store(settings: StorageSettings) -> Finding:
    url = settings.resolved_object_store_url()
    if not settings.object_store_url and not settings.data_dir.is_dir():
        return Finding("object store", "note", f"none in {settings.data_dir} yet: the first start makes it")
    store = open_object_store(url)
    try:
        store.check()
    finally:
        store.close()
    return Finding("object store", "ok", redact(url).partition("?")[0])


def _broker(settings: JobsSettings) -> Finding:
    if not settings.broker_url:
        return _embedded_broker(settings)
    import kombu
    from kombu.exceptions import OperationalError

    shown = _redact_broker(settings.broker_url)
    try:
        with kombu.Connection(settings.broker_url, connect_timeout=CONNECT_S) as connection:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=CONNECT_S)
    except (OperationalError, OSError, KeyError, ValueError) as error:
        return Finding(
            "broker", "fail", f"{shown} cannot be reached ({error}): correct PIECEWORK_BROKER_URL or start it"
        )
    return Finding("broker", "ok", shown)


def _embedded_broker(settings: JobsSettings) -> Finding:
    server = broker.find_server()
    if server is None:
        return Finding("broker", "fail", broker.NO_WHEEL)
    version = subprocess.run([server, "--version"], capture_output=True, text=True, check=False).stdout
    name = " ".join(version.split()[:3]) or "Valkey"
    if not broker.ping(settings.broker_socket()):
        return Finding("broker", "ok", f"embedded {name}; `piecework serve` starts it")
    return Finding("broker", "ok", f"embedded {name} answers at {settings.broker_socket()}")


def _redact_broker(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _state_of_runs(settings: StorageSettings) -> Finding:
    alarms = _ask(settings, workers.count_alarms)
    if alarms is None:
        return Finding("state of runs", "ok", "there is none yet")
    if alarms.damaged_snapshots or alarms.replay_mismatches:
        seen = (
            f"{alarms.damaged_snapshots} snapshots were damaged, {alarms.replay_mismatches} operations computed again"
        )
        advice = "the workers' logs name them (snapshot_damaged, replay_mismatch): check disk, memory and object store"
        return Finding("state of runs", "note", f"{seen} gave another result; {advice}")
    return Finding("state of runs", "ok", "every snapshot that was read was whole, every replay gave what is on record")


def _base_models(settings: StorageSettings) -> Finding:
    names = [model.name for model in _ask(settings, base_models.list_base_models) or ()]
    if not names:
        return Finding("base models", "note", "none yet: piecework models add starter, or a hub id or directory")
    return Finding("base models", "ok", ", ".join(names))


def _ask(settings: StorageSettings, read: Callable[[Connection], T]) -> T | None:
    """What stands in the database; None where there is none, or where the next start has to bring it up to date."""
    if not settings.has_database():
        return None
    database = Database(settings.resolved_database_url(), sqlite_synchronous=settings.sqlite_synchronous)
    try:
        if not is_current(database):
            return None
        with database.read() as tx:
            return read(tx)
    finally:
        database.close()


def _service(data_dir: Path) -> Finding:
    processes = process_table.read(data_dir)
    if not processes:
        return Finding("service", "note", f"does not run: piecework serve --data-dir {data_dir}")
    roles = ", ".join(f"{one.role} {one.pid}" for one in processes)
    return Finding("service", "ok", f"{process_table.find_url(data_dir)} ({roles})")


def _device() -> Finding:
    """Asked in a process of its own: this one never imports torch."""
    command = [sys.executable, "-P", "-c", TORCH_PROBE]
    try:
        probe = subprocess.run(command, capture_output=True, text=True, timeout=TORCH_S, check=False)
    except subprocess.TimeoutExpired:
        return Finding("device", "fail", f"torch did not load within {TORCH_S:.0f} s: is the disk overloaded?")
    if probe.returncode:
        reason = (probe.stderr.strip().splitlines() or ["no reason given"])[-1]
        return Finding("device", "fail", f"torch does not load ({reason}): make install")
    version, threads, cuda = json.loads(probe.stdout.strip().splitlines()[-1])
    devices = ", ".join(f"cuda:{i} {name}" for i, name in enumerate(cuda)) or f"cpu, {threads} threads"
    return Finding("device", "ok", f"{devices} (torch {version})")
