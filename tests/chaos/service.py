"""The service under fire, on either set-up: all its parts are started again when they die, and can be found by role.

Embedded, `piecework serve` starts its own children again, and this only `serve` itself; deployed, two workers, each
with a supervisor and a fork server of its own, two api processes and a scheduler are kept running as an operator would.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from storage.supervision import API_NAME, WORKER_NAME
from tests.chaos.proxy import Proxy
from tests.chaos.servers import Servers
from tests.servers import free_port
from tests.setups.deployment import STOP_S, Deployment, find_name
from worker.forkserver import FORKSERVER_NAME

LEASE_S = 2.5
UPLOAD_EXPIRY_S = 3.0
RETENTION_S = 90.0
SETTINGS = {
    "PIECEWORK_LEASE_S": LEASE_S,
    "PIECEWORK_UPLOAD_EXPIRY_S": UPLOAD_EXPIRY_S,
    "PIECEWORK_SWEEP_S": 0.5,
    "PIECEWORK_OBJECT_SWEEP_S": 1,
    "PIECEWORK_STALLED_AFTER_S": 1,
    "PIECEWORK_MESSAGE_EXPIRES_S": 10,
    "PIECEWORK_SAFETY_READ_S": 0.5,
    "PIECEWORK_SLICE_S": 1,
    "PIECEWORK_WARM_S": 2,
    "PIECEWORK_WRITEBACK_S": 0.3,
    "PIECEWORK_RESULT_RETENTION_S": RETENTION_S,
    "PIECEWORK_INLINE_BYTES_MAX": 1500,
    "PIECEWORK_POLL_S": 5,
    "PIECEWORK_THREADS": 1,
    "PIECEWORK_DEVICE": "cpu",
}
"""Short times, so that much happens in a minute, and small rows, so that some payloads are objects."""

ROLES = {"api": "api", "worker": "worker", "jobs.scheduler": "scheduler", "api.cli": "supervisor"}
"""By the module that a process runs."""


class Service(Deployment):
    """A service whose parts may be killed at any time.

    Attributes:
        links: what can be cut: the way of the clients, and to each server.
        servers: of the deployed set-up.
    """

    def __init__(self, directory: Path, model: Path, servers: Servers | None) -> None:
        self.servers = servers
        self.links: Mapping[str, Proxy] = {}
        settings = {name: str(value) for name, value in SETTINGS.items()}
        super().__init__(directory, model, servers.urls() if servers else None, settings=settings)

    def start(self) -> None:
        """Start all parts behind their links, and wait until clients are answered."""
        self._ports = [self.port] if self.servers is None else [self.port, free_port()]
        clients = Proxy(*self._ports)
        self.links = {"clients": clients, **(self.servers.links if self.servers else {})}
        self.url = f"http://127.0.0.1:{clients.port}"
        super().start()

    @property
    def points(self) -> Path:
        """Where armed points lie, and those that fired."""
        return self._failpoints

    def processes(self, role: str) -> list[psutil.Process]:
        """The running processes of a role, the oldest first."""
        return sorted((one for one in self._family() if _role(one) == role), key=_created_at)

    def roles(self) -> Mapping[int, str]:
        """What every running process is, by its id."""
        return {one.pid: _role(one) for one in self._family()}

    def empty_broker(self) -> None:
        """Kill the embedded broker, and have it begin with nothing."""
        for broker in self.processes("broker"):
            with contextlib.suppress(psutil.NoSuchProcess):
                broker.send_signal(signal.SIGSTOP)
                for entry in (self.directory / "data" / "broker").iterdir():
                    shutil.rmtree(entry)
                broker.kill()

    def shut_down(self) -> Mapping[str, int | None]:
        """SIGTERM to all parts; their exit statuses, None for what had to be killed. Called again, it does nothing."""
        if self._closing.is_set():
            return {}
        self._closing.set()
        with self._lock:
            children, family = dict(self._children), self._family()
        for child in children.values():
            child.terminate()
        statuses = {name: _wait(child) for name, child in children.items()}
        statuses |= {f"{_role(left)} {left.pid}": None for left in family if left.is_running() and _role(left)}
        self.close()
        return statuses

    def close(self) -> None:
        """Stop everything, links too."""
        super().close()
        self.links["clients"].close()

    def _parts(self) -> Mapping[str, Sequence[str]]:
        parts = dict(super()._parts())
        if self.servers is not None:
            parts["api-1"] = ("api", "--host", "127.0.0.1", "--port", str(self._ports[1]))
            parts["worker-1"] = ("worker",)
        return parts

    def _restarted(self) -> Mapping[str, Sequence[str]]:
        return self._parts()

    def _family(self) -> list[psutil.Process]:
        """Our children and theirs."""
        found: list[psutil.Process] = []
        for child in list(self._children.values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(child.pid)
                found += [parent, *parent.children(recursive=True)]
        return found


def _wait(child: subprocess.Popen[bytes]) -> int | None:
    try:
        return child.wait(STOP_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return None


def _role(process: psutil.Process) -> str:
    try:
        command = process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
    if command and "valkey-server" in command[0]:
        return "broker"
    module = command[command.index("-m") + 1] if "-m" in command[:-1] else ""
    name = find_name(process)
    return name if name in (API_NAME, WORKER_NAME, FORKSERVER_NAME) else ROLES.get(module, "")


def _created_at(process: psutil.Process) -> float:
    try:
        return float(process.create_time())
    except psutil.NoSuchProcess:
        return 0.0
