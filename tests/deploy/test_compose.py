"""compose.yaml, Dockerfile and .env.example agree with each other and with the code; no container engine is needed."""

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy.engine import make_url

from api.settings import ApiSettings
from billing.settings import BillingSettings
from jobs.settings import JobsSettings
from storage import workers
from storage.migrate import migrate
from storage.object_url import ACCESS_KEY_VARIABLE, SECRET_KEY_VARIABLE, s3_location
from storage.open import open_storage
from storage.settings import StorageSettings
from worker.settings import WorkerSettings

_ROOT = Path(__file__).parents[2]
_TEXT = (_ROOT / "compose.yaml").read_text()
_COMPOSE: dict[str, Any] = yaml.safe_load(_TEXT)
_SERVICES: dict[str, dict[str, Any]] = _COMPOSE["services"]
_EXAMPLE = dict(
    line.split("=", 1) for line in (_ROOT / ".env.example").read_text().splitlines() if re.match(r"\w", line)
)
_SECRET = re.compile(r"PASSWORD|SECRET|KEY|AUTH|ROOT_USER")
_VARIABLE = re.compile(r"(?<!\$)\$\{(?P<name>\w+)(?P<operator>:[?-])?(?P<rest>[^}]*)\}")


def _environment() -> Iterator[tuple[str, str, str]]:
    for service, body in _SERVICES.items():
        for name, value in body.get("environment", {}).items():
            yield service, name, value


def _filled(value: str) -> str:
    return _VARIABLE.sub(lambda match: match["rest"] if match["operator"] == ":-" else "filled", value)


def _jobs() -> set[str]:
    """Services that run once: others wait for their end."""
    waits = (body.get("depends_on", {}).items() for body in _SERVICES.values())
    return {name for wait in waits for name, how in wait if how["condition"] == "service_completed_successfully"}


def test_the_file_is_valid_compose() -> None:
    checker = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*checker, str(_ROOT / "compose.yaml")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_part_of_the_house_is_there() -> None:
    assert {"api", "scheduler", "worker", "postgres", "valkey", "minio", "bucket", "tables"} <= _SERVICES.keys()
    for part in ("api", "scheduler", "worker"):
        assert _SERVICES[part]["command"] == [part]


def test_the_worker_reserves_a_gpu_unless_the_other_profile_is_chosen() -> None:
    (device,) = _SERVICES["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert _SERVICES["worker"]["profiles"] == ["gpu"]
    assert _SERVICES["worker-cpu"]["profiles"] == ["cpu"]
    assert "deploy" not in _SERVICES["worker-cpu"]
    assert _EXAMPLE["COMPOSE_PROFILES"] in {"gpu", "cpu"}


@pytest.mark.parametrize(("service", "name", "value"), list(_environment()))
def test_every_secret_must_be_set(service: str, name: str, value: str) -> None:
    if _SECRET.search(name):
        assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), f"{service}: {name} has a default"


def test_no_secret_has_a_default_anywhere() -> None:
    for match in _VARIABLE.finditer(_TEXT):
        if _SECRET.search(match["name"]):
            assert match["operator"] == ":?", match[0]
            assert _EXAMPLE[match["name"]] == ""


def test_every_variable_is_explained_in_the_example() -> None:
    used = {match["name"] for match in _VARIABLE.finditer(_TEXT)} - {"PIECEWORK_VERSION"}
    assert used | {"COMPOSE_PROFILES"} == set(_EXAMPLE)


@pytest.mark.parametrize("service", sorted(_SERVICES))
def test_every_service_has_a_health_check_and_only_what_runs_once_has_none(service: str) -> None:
    check = _SERVICES[service]["healthcheck"]
    assert check.get("disable", False) == (service in _jobs())
    assert check.get("disable") or check["test"]


@pytest.mark.parametrize("service", sorted(_SERVICES))
def test_every_image_is_pinned_or_built_here(service: str) -> None:
    body = _SERVICES[service]
    if "build" in body:
        assert body["image"].startswith("piecework:")
    else:
        assert re.search(r":(\d+\.\d+(\.\d+)?-\w+|RELEASE\.\d{4}-\d\d-\d\dT[\d-]+Z)$", body["image"])


def test_everything_that_must_stay_lies_in_a_declared_volume() -> None:
    used = {volume.partition(":")[0] for body in _SERVICES.values() for volume in body.get("volumes", [])}
    assert used == _COMPOSE["volumes"].keys()
    for service in ("postgres", "valkey", "minio"):
        assert _SERVICES[service]["volumes"]


def test_nothing_but_the_api_listens_outside_and_it_on_this_machine_alone() -> None:
    assert [name for name, body in _SERVICES.items() if "ports" in body] == ["api"]
    (port,) = _SERVICES["api"]["ports"]
    assert _filled(port) == "127.0.0.1:8787:8787"


def test_every_setting_is_one_that_the_code_reads() -> None:
    settings = (ApiSettings, BillingSettings, JobsSettings, StorageSettings, WorkerSettings)
    known = {f"PIECEWORK_{name.upper()}" for one in settings for name in one.model_fields}
    known |= {ACCESS_KEY_VARIABLE, SECRET_KEY_VARIABLE}
    in_image = re.findall(r"(PIECEWORK_\w+)=", (_ROOT / "Dockerfile").read_text())
    used = {name for _, name, _ in _environment() if name.startswith("PIECEWORK_")} | set(in_image)
    assert used <= known


def test_the_urls_name_the_services() -> None:
    # Given
    settings = {name: _filled(value) for service, name, value in _environment() if service == "api"}
    # When
    database, location = (
        make_url(settings["PIECEWORK_DATABASE_URL"]),
        s3_location(settings["PIECEWORK_OBJECT_STORE_URL"], settings),
    )
    # Then
    assert (database.drivername, database.host) == ("postgresql+psycopg", "postgres")
    assert (location.endpoint, location.bucket, location.signed_urls) == ("minio:9000", "piecework", False)
    assert "@valkey:6379" in settings["PIECEWORK_BROKER_URL"]
    assert f"store/{location.bucket}" in _SERVICES["bucket"]["command"][0]


def test_the_workers_health_check_knows_a_live_worker_from_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given
    monkeypatch.setenv("PIECEWORK_DATA_DIR", str(tmp_path))
    _, python, *arguments = _SERVICES["worker"]["healthcheck"]["test"]
    assert python == "python"

    def is_healthy() -> bool:
        return subprocess.run([sys.executable, *arguments], cwd=_ROOT, check=False).returncode == 0

    storage = open_storage()
    migrate(storage.database)
    # Then none
    assert not is_healthy()
    # When it was seen long ago
    with storage.database.begin() as tx:
        now = storage.database.now(tx)
        long_ago = now - timedelta(minutes=2)
        workers.register(tx, worker_id="w", host=socket.gethostname(), pid=1, device="cpu", now=long_ago)
    # Then
    assert not is_healthy()
    # When it was seen just now
    with storage.database.begin() as tx:
        workers.record_seen(tx, "w", now=now)
    # Then
    assert is_healthy()
    storage.close()


def test_the_image_holds_every_package_is_pinned_and_does_not_run_as_root() -> None:
    # Given
    lines = (_ROOT / "Dockerfile").read_text().splitlines()
    # Then
    assert [line for line in lines if line.startswith("FROM")] == ["FROM python:3.11.13-slim-bookworm"]
    assert [line for line in lines if line.startswith("USER")] == ["USER piecework"]
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    assert {"api", "jobs", "worker", "storage", "billing", "pyproject.toml", "constraints.txt"} <= copied
    allowed = set((_ROOT / ".dockerignore").read_text().split("\n"))
    assert {f"!{word}" for word in copied} <= allowed
    assert all((_ROOT / word).exists() for word in copied)
