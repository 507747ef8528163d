"""PostgreSQL for tests, without fsync: it has to outlive tests and SIGKILL, not a loss of power."""

import os
import secrets
from pathlib import Path

import psycopg

from tests.servers.process import ServerDirectory, ServerMissingError, find_program, free_port, run

_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "300",
    "shared_buffers": "64MB",
}


class PostgresServer:
    """A running PostgreSQL cluster. Its programs refuse to run as root, so root runs them as `postgres`.

    Attributes:
        process: the server itself.
    """

    def __init__(self) -> None:
        """Start it; about 2 s."""
        programs = _programs()
        user = "postgres" if os.geteuid() == 0 else ""
        password = secrets.token_hex(12)
        self._port = free_port()
        self._directory = ServerDirectory("postgres", owner=user)
        self.url = f"postgresql+psycopg://postgres:{password}@127.0.0.1:{self._port}/postgres"
        try:
            self._start(programs, user, password)
        except BaseException:
            self.close()
            raise

    def create_database(self) -> str:
        """Make an empty database.

        Returns:
            its SQLAlchemy URL.
        """
        name = f"test_{secrets.token_hex(6)}"
        self._execute(f"CREATE DATABASE {name} TEMPLATE template0")
        return self.url.removesuffix("/postgres") + f"/{name}"

    def drop_database(self, url: str) -> None:
        """Delete a database, whoever is still connected."""
        self._execute(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")

    def restart(self) -> None:
        """Start it again after it was killed; what was committed is there."""
        self.process.start_again()
        self.process.wait_until(self._is_ready)

    def close(self) -> None:
        """Stop it and delete its files."""
        self._directory.close()

    def _start(self, programs: Path, user: str, password: str) -> None:
        data, password_file = self._directory.path / "data", self._directory.path / "password"
        password_file.write_text(password)
        initdb = [
            programs / "initdb",
            "-D",
            data,
            "-U",
            "postgres",
            "--pwfile",
            password_file,
            "--no-sync",
            "--no-locale",
        ]
        run([*initdb, "--encoding=UTF8", "--auth=scram-sha-256"], user=user)
        settings = {**_SETTINGS, "port": str(self._port), "unix_socket_directories": str(self._directory.path)}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self.process = self._directory.start("postgres", [programs / "postgres", "-D", data, *options], user=user)
        self.process.wait_until(self._is_ready)

    def _is_ready(self) -> bool:
        try:
            self._execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def _execute(self, statement: str) -> None:
        with psycopg.connect(self.url.replace("+psycopg", ""), autocommit=True, connect_timeout=5) as connection:
            connection.execute(statement.encode())


def _programs() -> Path:
    """The newest installed version's; Debian keeps them off the path."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    try:
        return find_program("initdb", *versions).parent
    except ServerMissingError:
        raise ServerMissingError("PostgreSQL") from None
