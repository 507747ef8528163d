"""The service as real processes, on either set-up: `piecework serve`, or its parts on servers of their own.

What dies is started again: everything embedded, and every worker, by a supervisor, the other parts by a thread here, as
an orchestrator would.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from api.cli import process_table
from jobs.settings import JobsSettings
from storage import failpoints
from storage.failpoints import Point
from storage.open import Storage, open_storage
from storage.settings import StorageSettings
from storage.supervision import WORKER_NAME
from tests.servers import free_port

PIECEWORK = (sys.executable, "-P", "-m", "api.cli")
START_S = 120.0
STOP_S = 60.0
LOOK_S = 0.05
MODEL = "tiny"
_STORAGE_URLS = ("database_url", "object_store_url")


class Deployment:
    """A running service with one base model and one API key.

    Args:
        directory: data directory and logs.
        urls: `PIECEWORK_…_URL`s of a deployed service; none: everything embedded.
        model: directory of the base model, served as `MODEL`.
        settings: more variables of its processes.
    """

    def __init__(
        self,
        directory: Path,
        model: Path,
        urls: Mapping[str, str] | None = None,
        *,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._embedded = not urls
        own = {name: value for name, value in os.environ.items() if not name.startswith("PIECEWORK_")}
        self._environment = {**own, "PIECEWORK_DATA_DIR": str(directory / "data"), **(urls or {})}
        self._environment["PIECEWORK_CACHE_DIR"] = str(directory / "cache")
        # Where a supervisor dies with its worker, leases have to expire: short ones, so that no test waits for long.
        self._environment |= {} if self._embedded else {"PIECEWORK_LEASE_S": "3", "PIECEWORK_SWEEP_S": "0.5"}
        self._environment |= settings or {}
        self._failpoints = directory / "failpoints"
        self._failpoints.mkdir()
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self.command("models", "add", str(model), "--name", MODEL)
        self.api_key = self.create_account("tests")
        self._environment[failpoints.VARIABLE] = str(self._failpoints)
        self.start()
        if self._restarted():
            threading.Thread(target=self._start_what_dies, daemon=True).start()

    def command(self, *arguments: str) -> str:
        """Output of a `piecework` command that must succeed."""
        done = subprocess.run(
            [*PIECEWORK, *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def command_json(self, *arguments: str) -> Any:
        """What a command prints for programs."""
        return json.loads(self.command(*arguments, "--json"))

    def create_account(self, name: str) -> str:
        """Make an account; returns an API key of it."""
        self.command("accounts", "create", name, "--json")
        return str(self.command_json("keys", "create", "--account", name)["api_key"])

    @contextlib.contextmanager
    def storage(self) -> Iterator[Storage]:
        """The service's rows and objects, as its own processes see them."""
        names = {name: self._environment.get(f"PIECEWORK_{name.upper()}", "") for name in _STORAGE_URLS}
        opened = open_storage(StorageSettings(data_dir=self.directory / "data", **names))
        try:
            yield opened
        finally:
            opened.close()

    def broker_url(self) -> str:
        """Where its messages go."""
        return JobsSettings(
            data_dir=self.directory / "data", broker_url=self._environment.get("PIECEWORK_BROKER_URL", "")
        ).resolved_broker_url()

    # ------------------------------------------------------------------------------------------------ killing things

    def pids(self, role: str) -> list[int]:
        """The processes of a role: api, worker (and nothing else of its family), scheduler; embedded also broker."""
        if not self._embedded:
            children = [child.pid for name, child in self._children.items() if name == role]
            return children if role != "worker" else [pid for child in children for pid in _workers_of(child)]
        return [process.pid for process in process_table.read(self.directory / "data") if process.role == role]

    def kill(self, role: str) -> None:
        """SIGKILL to all processes of a role; they are started again."""
        for pid in self._wait_for_pids(role):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill_worker(self) -> None:
        """SIGKILL; another is started."""
        self.kill("worker")

    def kill_everything(self) -> None:
        """SIGKILL to every process at once; nothing is started again until `start`."""
        with self._lock:
            family = [relative for child in self._children.values() for relative in _family(child.pid)]
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            for child in self._children.values():
                child.wait()
            self._children.clear()
        psutil.wait_procs(family, STOP_S)

    def arm(self, point: Point, action: str = "kill", *, pid: int | None = None) -> None:
        """Have the first process that comes by a point, or that process alone, be killed, stopped or held up there."""
        name = point if pid is None else f"{point}@{pid}"
        draft = self._failpoints / f"{name}.draft"
        draft.write_text(action)
        draft.rename(self._failpoints / name)

    def fired(self, point: Point) -> int:
        """Wait until a process has come by an armed point; returns its pid."""
        deadline = time.monotonic() + START_S
        while not (found := list(self._failpoints.glob(f"{point}.fired-*"))):
            assert time.monotonic() < deadline, f"nobody came by {point}:\n{self.log()[-4000:]}"
            time.sleep(LOOK_S)
        pid = int(found[0].name.rpartition("-")[2])
        found[0].unlink()
        return pid

    def disarm(self) -> None:
        """Take all points back."""
        for file in self._failpoints.iterdir():
            file.unlink(missing_ok=True)

    def start_worker(self, name: str, *, settings: Mapping[str, str] | None = None) -> None:
        """One more worker, with a supervisor and a fork server of its own; its first process has its name as id.

        Args:
            settings: more variables of its processes.
        """
        self._launch(name, "worker", settings={"PIECEWORK_WORKER_ID": name, **(settings or {})})

    def start_part(self, name: str) -> None:
        """Start a part that `end_child` has ended."""
        self._launch(name, *self._parts()[name])

    def end_child(self, name: str) -> None:
        """SIGKILL one part for good."""
        with self._lock:
            child = self._children.pop(name)
        child.kill()
        child.wait()

    def stop_child(self, name: str) -> int:
        """SIGTERM one part and wait for its end; returns its exit status."""
        with self._lock:
            child = self._children.pop(name)
        child.terminate()
        return child.wait(STOP_S)

    def log(self) -> str:
        """Everything that the processes have logged."""
        files = sorted(self.directory.rglob("*.log"))
        return "\n".join(f"== {file.name}\n{file.read_text(errors='replace')}" for file in files)

    def events(self, name: str, **fields: object) -> list[dict[str, Any]]:
        """What the processes have logged of this name, with these fields among others."""
        lines = (line for line in self.log().splitlines() if line.startswith("{") and f'"{name}"' in line)
        found = (json.loads(line) for line in lines)
        return [event for event in found if event.get("event") == name and fields.items() <= event.items()]

    def close(self) -> None:
        """Stop everything, and make sure that nothing is left."""
        self._closing.set()
        self._lock.acquire()
        family = [relative for child in self._children.values() for relative in _family(child.pid)]
        for child in self._children.values():
            child.terminate()
        for child in self._children.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(STOP_S)
        left = [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        for process in left:
            process.kill()
        assert not left, f"still running after SIGTERM: {left}\n{self.log()[-4000:]}"

    def start(self) -> None:
        """Start all parts and wait until operations are accepted."""
        for name, arguments in self._parts().items():
            self._launch(name, *arguments)
        self.wait_until_healthy()

    def wait_until_healthy(self) -> None:
        """Return once operations are accepted."""
        deadline = time.monotonic() + START_S
        while not self._is_healthy():
            ended = [name for name, child in self._children.items() if child.poll() is not None]
            assert not ended, f"{ended} ended:\n{self.log()}"
            assert time.monotonic() < deadline, f"not healthy after {START_S} s:\n{self.log()}"
            time.sleep(LOOK_S)

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/healthz", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _wait_for_pids(self, role: str) -> list[int]:
        """The processes of a role, once there is one: a process that was killed may not have been replaced yet."""
        deadline = time.monotonic() + START_S
        while not (pids := self.pids(role)):
            assert time.monotonic() < deadline, f"no {role} is started:\n{self.log()[-4000:]}"
            time.sleep(LOOK_S)
        return pids

    def _parts(self) -> Mapping[str, Sequence[str]]:
        """The command line of each part, by its name."""
        address = ("--host", "127.0.0.1", "--port", str(self.port))
        if self._embedded:
            return {"serve": ("serve", *address)}
        return {"api": ("api", *address), "worker": ("worker",), "scheduler": ("scheduler",)}

    def _restarted(self) -> Mapping[str, Sequence[str]]:
        """The parts that are started again when they die; embedded the supervisor does that for those it has."""
        return {} if self._embedded else self._parts()

    def _start_what_dies(self) -> None:
        while not self._closing.wait(LOOK_S):
            with self._lock:
                for name, arguments in self._restarted().items():
                    if name in self._children and self._children[name].poll() is not None:
                        self._launch(name, *arguments)

    def _launch(self, name: str, *arguments: str, settings: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        with (self.directory / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                [*PIECEWORK, *arguments],
                env={**self._environment, **(settings or {})},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._children[name] = child
        return child


def _family(pid: int) -> Sequence[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _workers_of(supervisor_pid: int) -> Sequence[int]:
    """The process that works among the children of a `piecework worker`."""
    return [process.pid for process in _family(supervisor_pid) if find_name(process) == WORKER_NAME]


def find_name(process: psutil.Process) -> str:
    """What a process calls itself; nothing if it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        if process.status() != psutil.STATUS_ZOMBIE:
            return str(process.name())
    return ""
