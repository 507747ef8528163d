"""One service for the recipes: started with the starter model, ended with all of its processes."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

START_S = 120.0
STOP_S = 30.0
GONE_S = 10.0
COMMAND_S = 300.0
LOOK_S = 0.2


def free_port() -> int:
    """A port at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def is_running(pid: int) -> bool:
    """Whether a process lives; one that has ended and waits for its parent does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def end_group(process: subprocess.Popen[bytes], *, patience_s: float) -> None:
    """Ask a process group to end, and end it by force when it does not."""
    for number, wait_s in ((signal.SIGTERM, patience_s), (signal.SIGKILL, patience_s)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)
            return


class Service:
    """`piecework serve` on a free port, with one base model and one API key."""

    def __init__(self, piecework: Path, folder: Path, *, model: str, model_name: str) -> None:
        """Nothing starts before the `with` block.

        Args:
            piecework: the command.
            folder: where its data directory and its log go.
            model: what `piecework models add` takes.
            model_name: the name under which it is served.
        """
        self.url = f"http://127.0.0.1:{free_port()}"
        self.log = folder / "service.log"
        self.api_key = ""
        self._piecework, self._data_dir = piecework, folder / "data"
        self._model, self._model_name = model, model_name
        self._process: subprocess.Popen[bytes] | None = None
        self._pids: set[int] = set()

    def _command(self, *arguments: str) -> str:
        """The output of a `piecework` command on this service's data directory."""
        command = [str(self._piecework), *arguments]
        environment = {**os.environ, "PIECEWORK_DATA_DIR": str(self._data_dir)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=COMMAND_S, check=False)
        if done.returncode:
            raise SystemExit(f"`piecework {' '.join(arguments)}` failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def __enter__(self) -> Self:
        """Add the base model, make a key, start the service and wait until it accepts operations."""
        self._command("models", "add", self._model, "--name", self._model_name)
        self._command("accounts", "create", "cookbook", "--json")
        self.api_key = json.loads(self._command("keys", "create", "--account", "cookbook", "--json"))["api_key"]
        host, _, port = self.url.removeprefix("http://").partition(":")
        command = [str(self._piecework), "serve", "--host", host, "--port", port, "--data-dir", str(self._data_dir)]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self.stop()
            raise
        return self

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and process.poll() is None:
            with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{self.url}/api/v1/healthz"):
                return
            time.sleep(LOOK_S)
        raise SystemExit(f"the service did not start within {START_S:.0f} s:\n{self.log.read_text(errors='replace')}")

    def status(self) -> dict[str, Any]:
        """What `piecework status` says; remembers the processes it names."""
        status: dict[str, Any] = json.loads(self._command("status", "--json"))
        self._pids |= {process["pid"] for process in status["processes"]}
        return status

    def stop(self) -> None:
        """End the service; a second call does nothing."""
        if self._process is not None:
            end_group(self._process, patience_s=STOP_S)
            self._process = None

    def left_running(self) -> set[int]:
        """Processes of the stopped service that live on, after a moment to end."""
        deadline = time.monotonic() + GONE_S
        while (left := {pid for pid in self._pids if is_running(pid)}) and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        return left

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the service."""
        self.stop()
