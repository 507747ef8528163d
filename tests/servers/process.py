"""A server process of the tests: found, started under a warden, waited for, stopped."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

_WARDEN = Path(__file__).with_name("warden.py")
_POLL_S = 0.02
START_S = 120.0  # on a machine that is busy with other things


class ServerMissingError(Exception):
    """A program that the tests need is not installed."""

    def __init__(self, program: str) -> None:
        super().__init__(f"{program} is not installed: `make test-servers` installs what the tests need")


class ServerStartError(Exception):
    """A server did not start; the message holds the end of its log."""


class ServerProcess:
    """One running server program."""

    def __init__(
        self, command: Sequence[str | Path], log: Path, *, user: str = "", env: Mapping[str, str] | None = None
    ) -> None:
        """Start it.

        Args:
            command: the program and its arguments; it must stay in the foreground.
            log: where its output goes.
            user: whom to run it as; empty: as we are.
            env: variables besides our own.
        """
        self.log = log
        self._command = [sys.executable, "-I", str(_WARDEN), str(log), user, *map(str, command)]
        self._env = {**os.environ, **(env or {})}
        self._warden = self._launch()

    def wait_until(self, ready: Callable[[], bool], *, timeout_s: float = START_S) -> None:
        """Return once `ready` says so.

        Raises:
            ServerStartError: the server ended, or took too long.
        """
        deadline = time.monotonic() + timeout_s
        while not ready():
            if self._warden.poll() is not None:
                raise ServerStartError(f"{self.log.stem} ended with {self._warden.returncode}:\n{self._last_lines()}")
            if time.monotonic() > deadline:
                raise ServerStartError(f"{self.log.stem} was not ready in {timeout_s} s:\n{self._last_lines()}")
            time.sleep(_POLL_S)

    def start_again(self) -> None:
        """Start the program once more, after `kill`."""
        self.stop()  # closes the pipe to the warden, which is gone
        self._warden = self._launch()

    def kill(self) -> None:
        """SIGKILL the program with all its processes, and wait until they are gone."""
        family = self._family()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family)
        self._warden.wait()

    def send(self, signal_number: int) -> None:
        """Send a signal to the program and all its processes."""
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal_number)

    def stop(self) -> None:
        """End it and wait until it is gone; harmless when it is gone already."""
        assert self._warden.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._warden.stdin as order:
            order.write(b".")
        self._warden.wait()

    def _launch(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, stdin=subprocess.PIPE, env=self._env, start_new_session=True)

    def _family(self) -> list[psutil.Process]:
        """The program and its processes, without the warden."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self._warden.pid).children(recursive=True)
        return []

    def _last_lines(self) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-30:])


class ServerDirectory:
    """A temporary directory with the processes that work in it; both end together."""

    def __init__(self, name: str, *, owner: str = "") -> None:
        """Make it.

        Args:
            name: of the server, seen in the directory's name.
            owner: whom it belongs to; empty: us.
        """
        # A socket's path has at most 107 characters, so not below a long TMPDIR such as pytest's.
        self.path = Path(tempfile.mkdtemp(prefix=f"piecework-{name}-"))
        self._processes: list[ServerProcess] = []
        if owner:
            shutil.chown(self.path, owner, owner)

    def start(
        self, name: str, command: Sequence[str | Path], *, user: str = "", env: Mapping[str, str] | None = None
    ) -> ServerProcess:
        """Start a process whose output goes to `<name>.log` here."""
        process = ServerProcess(command, self.path / f"{name}.log", user=user, env=env)
        self._processes.append(process)
        return process

    def close(self) -> None:
        """Stop the processes, the last one first, and delete the directory."""
        for process in reversed(self._processes):
            process.stop()
        shutil.rmtree(self.path, ignore_errors=True)


def find_program(name: str, *directories: Path) -> Path:
    """Return where a program is.

    Raises:
        ServerMissingError: it is in none of the directories, nor on the path.
    """
    search = [*map(str, directories), os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]
    found = shutil.which(name, path=os.pathsep.join(search))
    if found is None:
        raise ServerMissingError(name)
    return Path(found)


def free_port() -> int:
    """Return a loopback TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def answers(port: int, say: bytes = b"", expect: bytes = b"") -> bool:
    """Say something to a loopback port; whether the answer begins as expected."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
        connection.sendall(say)
        return not expect or connection.recv(64).startswith(expect)
    return False


def run(
    command: Sequence[str | Path], *, user: str = "", env: Mapping[str, str] | None = None, timeout_s: float = 60
) -> str:
    """Run a program to its end.

    Returns:
        what it printed.

    Raises:
        ServerStartError: it failed; with what it printed to standard error.
    """
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **(env or {})},
        user=user or None,
        group=user or None,
        extra_groups=[] if user else None,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode:
        raise ServerStartError(f"{Path(command[0]).name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout
