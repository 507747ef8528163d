"""The service as real processes, on either set-up: `piecework serve`, or its parts on servers of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

PIECEWORK = (sys.executable, "-P", "-m", "api.cli")
START_S = 120.0
STOP_S = 60.0
LOOK_S = 0.05
MODEL = "tiny"


class Deployment:
    """A running service with one base model and one API key.

    Args:
        directory: data directory and logs.
        urls: `PIECEWORK_…_URL`s of a deployed service; none: everything embedded.
        model: directory of the base model, served as `MODEL`.
    """

    def __init__(self, directory: Path, model: Path, urls: Mapping[str, str] | None = None) -> None:
        self.directory = directory
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._embedded = not urls
        own = {name: value for name, value in os.environ.items() if not name.startswith("PIECEWORK_")}
        self._environment = {**own, "PIECEWORK_DATA_DIR": str(directory / "data"), **(urls or {})}
        self._environment["PIECEWORK_CACHE_DIR"] = str(directory / "cache")
        # Nobody sees a worker die there but by its lease: a short one, so that the tests need not wait for long.
        self._environment |= {} if self._embedded else {"PIECEWORK_LEASE_S": "3", "PIECEWORK_SWEEP_S": "0.5"}
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self.command("models", "add", str(model), "--name", MODEL)
        self.command("accounts", "create", "tests", "--json")
        self.api_key = str(self.command_json("keys", "create", "--account", "tests")["api_key"])
        self._start()

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

    def worker_pid(self) -> int:
        """The pid of the worker process."""
        if not self._embedded:
            return self._children["worker"].pid
        processes = self.command_json("status")["processes"]
        return next(int(process["pid"]) for process in processes if process["role"] == "worker")

    def kill_worker(self) -> None:
        """SIGKILL; the embedded supervisor starts another by itself, elsewhere this does."""
        os.kill(self.worker_pid(), signal.SIGKILL)
        if not self._embedded:
            self._children["worker"].wait()
            self._launch("worker", "worker")

    def start_worker(self, name: str) -> int:
        """One more worker; returns its pid."""
        return self._launch(name, "worker").pid

    def stop_child(self, name: str) -> int:
        """SIGTERM one part and wait for its end; returns its exit status."""
        child = self._children.pop(name)
        child.terminate()
        return child.wait(STOP_S)

    def log(self) -> str:
        """Everything that the processes have logged."""
        files = sorted(self.directory.rglob("*.log"))
        return "\n".join(f"== {file.name}\n{file.read_text(errors='replace')}" for file in files)

    def close(self) -> None:
        """Stop everything, and make sure that nothing is left."""
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

    def _start(self) -> None:
        if self._embedded:
            self._launch("serve", "serve", "--host", "127.0.0.1", "--port", str(self.port))
        else:
            self._launch("api", "api", "--host", "127.0.0.1", "--port", str(self.port))
            self._launch("worker", "worker")
            self._launch("scheduler", "scheduler")
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

    def _launch(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.directory / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                [*PIECEWORK, *arguments], env=self._environment, stdout=log, stderr=subprocess.STDOUT
            )
        self._children[name] = child
        return child


def _family(pid: int) -> Sequence[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
