"""The service under fire, on either set-up: finds its processes by role, and starts again what died.

Embedded, `piecework serve` starts its own children again, and this only `serve` itself; deployed, two workers, two api
processes and a scheduler are kept running as an operator's supervisor would.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from storage import failpoints
from storage.settings import StorageSettings
from tests.chaos.proxy import Proxy
from tests.chaos.servers import Servers
from tests.servers import free_port
from tests.setups.deployment import START_S, Deployment

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
RESTART_S = 0.3
LOOK_S = 0.05


class Service(Deployment):
    """A service whose parts may be killed at any time.

    Attributes:
        links: what can be cut: the way of the clients, and to each server.
        points: directory where failpoints are armed.
        client_url: where clients reach it, through a link.
    """

    def __init__(self, directory: Path, model: Path, servers: Servers | None) -> None:
        self.servers = servers
        self.points = directory / "points"
        self.points.mkdir()
        self._parts: dict[str, Sequence[str]] = {}
        self._ending = threading.Event()
        self._guard = threading.Thread(target=self._start_again, name="guard", daemon=True)
        settings = {name: str(value) for name, value in SETTINGS.items()}
        settings[failpoints.VARIABLE] = str(self.points)
        super().__init__(directory, model, servers.urls() if servers else None, settings)
        self._guard.start()

    @property
    def storage_settings(self) -> StorageSettings:
        """How to look at what it has stored, past all proxies."""
        urls = self.servers.direct_urls if self.servers else {}
        return StorageSettings(
            data_dir=self.directory / "data",
            database_url=urls.get("PIECEWORK_DATABASE_URL", ""),
            object_store_url=urls.get("PIECEWORK_OBJECT_STORE_URL", ""),
        )

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

    def shut_down(self) -> Mapping[str, int]:
        """SIGTERM to all parts; their exit statuses. Called again, it does nothing."""
        if self._ending.is_set():
            return {}
        self._ending.set()
        self._guard.join()
        children = dict(self._children)
        self.close()
        self.links["clients"].close()
        return {name: child.returncode for name, child in children.items()}

    def _family(self) -> list[psutil.Process]:
        """Our children and theirs."""
        found: list[psutil.Process] = []
        for child in list(self._children.values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(child.pid)
                found += [parent, *parent.children(recursive=True)]
        return found

    def _start(self) -> None:
        """Called by the constructor: start all parts and wait until clients are answered."""
        ports = [self.port] if self.servers is None else [self.port, free_port()]
        clients = Proxy(*ports)
        self.links = {"clients": clients, **(self.servers.links if self.servers else {})}
        self.client_url = self.url = f"http://127.0.0.1:{clients.port}"
        if self.servers is None:
            self._parts = {"serve": ("serve", "--host", "127.0.0.1", "--port", str(self.port))}
        else:
            self._parts = {
                f"api-{number}": ("api", "--host", "127.0.0.1", "--port", str(port))
                for number, port in enumerate(ports)
            }
            self._parts |= {"worker-0": ("worker",), "worker-1": ("worker",), "scheduler": ("scheduler",)}
        for name, arguments in self._parts.items():
            self._launch(name, *arguments)
        deadline = time.monotonic() + START_S
        while not self._is_healthy():
            assert time.monotonic() < deadline, f"not healthy after {START_S} s:\n{self.log()}"
            time.sleep(LOOK_S)

    def _start_again(self) -> None:
        """The guard: whatever of our own children ends is started again a moment later."""
        while not self._ending.wait(RESTART_S):
            for name, child in list(self._children.items()):
                if child.poll() is not None:
                    self._launch(name, *self._parts[name])


def _role(process: psutil.Process) -> str:
    try:
        command = process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
    if command and "valkey-server" in command[0]:
        return "broker"
    module = command[command.index("-m") + 1] if "-m" in command[:-1] else ""
    return ROLES.get(module, "")


def _created_at(process: psutil.Process) -> float:
    try:
        return float(process.create_time())
    except psutil.NoSuchProcess:
        return 0.0
