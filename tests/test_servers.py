"""The servers that tests start: reachable, apart from each other, and gone with whoever started them."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import kombu
import psycopg
import pytest
import redis

from tests.servers import PostgresServer, ServerMissingError, ServerStartError
from tests.servers.process import ServerDirectory, find_program

_ROOT = Path(__file__).parent.parent


@pytest.mark.servers
def test_fresh_databases_are_apart(postgres: PostgresServer, fresh_database_url: str) -> None:
    # Given
    other = postgres.create_database()
    # When
    with psycopg.connect(fresh_database_url.replace("+psycopg", "")) as connection:
        connection.execute("CREATE TABLE here (x int)")
    # Then
    with psycopg.connect(other.replace("+psycopg", "")) as connection:
        assert connection.execute("SELECT to_regclass('here')").fetchone() == (None,)
    postgres.drop_database(other)


@pytest.mark.servers
def test_rabbitmq_takes_messages_on_a_fresh_virtual_host(fresh_rabbitmq_url: str) -> None:
    # When
    with kombu.Connection(fresh_rabbitmq_url) as connection, connection.SimpleQueue("q") as queue:
        queue.put({"run": 1})
        message = queue.get(timeout=10)
        message.ack()
    # Then
    assert message.payload == {"run": 1}


@pytest.mark.servers
def test_fresh_valkey_databases_are_apart(valkey_url: str, fresh_valkey_url: str) -> None:
    # When
    with redis.Redis.from_url(fresh_valkey_url) as fresh, redis.Redis.from_url(valkey_url) as shared:
        fresh.set("here", "1")
        # Then
        assert shared.get("here") is None


def test_a_server_is_gone_when_whoever_started_it_is_killed(tmp_path: Path) -> None:
    # Given a process that starts a server which has a child of its own
    program = (
        "import sys, time; from tests.servers.process import ServerDirectory\n"
        "directory = ServerDirectory('test')\n"
        f"directory.start('server', ['sh', '-c', 'sleep 300 & echo $! > {tmp_path}/pid; wait'])\n"
        "print(directory.path, flush=True); time.sleep(300)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=_ROOT, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        directory = Path(starter.stdout.readline().strip())
        _wait(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"))
        pid = int((tmp_path / "pid").read_text())
        # When
        starter.send_signal(signal.SIGKILL)
    # Then
    _wait(lambda: not Path(f"/proc/{pid}").exists())
    _wait(lambda: not directory.exists())


def test_a_server_that_ends_at_once_is_an_error_with_its_log() -> None:
    # Given
    directory = ServerDirectory("test")
    server = directory.start("server", ["sh", "-c", "echo why it failed; exit 3"])
    # Then
    with pytest.raises(ServerStartError, match=r"ended with 3:\nwhy it failed"):
        server.wait_until(lambda: False)
    directory.close()
    assert not directory.path.exists()


def test_a_server_that_is_never_ready_is_an_error() -> None:
    # Given
    directory = ServerDirectory("test")
    server = directory.start("server", ["sleep", "300"])
    # Then
    with pytest.raises(ServerStartError, match="not ready"):
        server.wait_until(lambda: False, timeout_s=0.1)
    directory.close()


def test_a_missing_program_is_an_error_that_says_how_to_get_it() -> None:
    with pytest.raises(ServerMissingError, match="make test-servers"):
        find_program("no-such-program")


def _wait(until: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.02)
