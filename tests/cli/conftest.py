"""Real `piecework` commands and services in temporary data directories; every process is gone afterwards."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

WAIT_S = 180.0
LOOK_S = 0.02
PIECEWORK = (sys.executable, "-P", "-m", "api.cli")


def environment() -> dict[str, str]:
    """Our own, without settings of piecework that the person who runs the tests may have."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PIECEWORK_")}


def run(data_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    command = [*PIECEWORK, *arguments, "--data-dir", str(data_dir)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=WAIT_S, check=False)


def run_json(data_dir: Path, *arguments: str) -> Any:
    """What a command that must succeed prints for programs."""
    done = run(data_dir, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def wait_until(holds: Callable[[], bool], what: str, *, timeout_s: float = WAIT_S) -> None:
    """Look until something holds."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(LOOK_S)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Service:
    """A running `piecework serve`."""

    def __init__(self, data_dir: Path, *arguments: str) -> None:
        self.data_dir = data_dir
        self._output = data_dir.with_name(f"{data_dir.name}.out")
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [*PIECEWORK, "serve", "--port", "0", "--data-dir", str(data_dir), *arguments],
                env=environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What it has said so far."""
        return self._output.read_text()

    def wait_until_ready(self) -> None:
        """Return when it says that it is ready."""
        wait_until(lambda: "ready: http" in self.output or self.process.poll() is not None, "ready")
        assert self.process.poll() is None, self.output

    def pids(self) -> dict[str, int]:
        """Process ids by role, as the service tells them."""
        table = json.loads((self.data_dir / "processes.json").read_bytes())
        return {one["role"]: one["pid"] for one in table["processes"]}

    def get(self, path: str, api_key: str | None = None) -> int:
        """Status of a GET."""
        address = self.output.partition("ready: http://")[2].split()[0]
        connection = http.client.HTTPConnection(address, timeout=10)
        try:
            connection.request("GET", path, headers={"X-API-Key": api_key} if api_key else {})
            return connection.getresponse().status
        finally:
            connection.close()

    def is_healthy(self) -> bool:
        """Whether operations can be accepted."""
        with contextlib.suppress(OSError):
            return self.get("/api/v1/healthz") == 200
        return False

    def end(self) -> None:
        """End it by force; its processes die with it."""
        pids = list(self.pids().values()) if (self.data_dir / "processes.json").exists() else []
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(WAIT_S)
        wait_until(lambda: not any(map(is_alive, pids)), "the processes are gone")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service without base models, shared by the tests of a file."""
    started = Service(tmp_path_factory.mktemp("service") / "data")
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.end()


@pytest.fixture
def own_service(tmp_path: Path) -> Iterator[Service]:
    """A service that the test may end."""
    started = Service(tmp_path / "data")
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.end()
