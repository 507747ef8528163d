"""RabbitMQ for tests: a node of its own, with its own name, cookie and port mapper."""

import secrets
import shutil
from pathlib import Path

from tests.servers.process import ServerDirectory, ServerMissingError, answers, find_program, free_port, run

_AMQP_GREETING = b"AMQP\x00\x00\x09\x01"
_METHOD_FRAME = b"\x01"


class RabbitServer:
    """A running RabbitMQ node.

    Attributes:
        process: the server itself.
    """

    def __init__(self) -> None:
        """Start it; about 6 s."""
        programs = _programs()
        self._control = programs / "rabbitmqctl"
        self._port = free_port()
        self._directory = ServerDirectory("rabbitmq")
        self._env = _environment(self._directory.path, self._port)
        try:
            self._start(programs)
        except BaseException:
            self.close()
            raise
        self.url = f"amqp://guest:guest@127.0.0.1:{self._port}//"

    def create_virtual_host(self) -> str:
        """Make an empty virtual host; about 2 s, since RabbitMQ's own tool is slow to start.

        Returns:
            its URL.
        """
        name = f"test_{secrets.token_hex(6)}"
        script = f'rabbit_vhost:add(<<"{name}">>, <<"tests">>), rabbit_auth_backend_internal:set_permissions('
        script += f'<<"guest">>, <<"{name}">>, <<".*">>, <<".*">>, <<".*">>, <<"tests">>).'
        run([self._control, "eval", script], env=self._env)
        return self.url.removesuffix("/") + name

    def set_consumer_timeout(self, seconds: float) -> None:
        """How long a consumer may keep a message without acknowledging it; of channels opened from now on."""
        script = f"application:set_env(rabbit, consumer_timeout, {int(seconds * 1000)}), "
        script += "application:set_env(rabbit, channel_tick_interval, 500)."
        run([self._control, "eval", script], env=self._env)

    def restart(self, *, empty: bool) -> None:
        """Start it again after it was killed, with its durable queues or with nothing."""
        if empty:
            shutil.rmtree(self._env["RABBITMQ_MNESIA_BASE"])
        self.process.start_again()
        self._wait()

    def close(self) -> None:
        """Stop it and delete its files."""
        self._directory.close()

    def _start(self, programs: Path) -> None:
        """The port mapper goes first: a node that finds none starts one that would outlive it."""
        mapper_port = int(self._env["ERL_EPMD_PORT"])
        mapper = self._directory.start("epmd", [find_program("epmd")], env=self._env)
        mapper.wait_until(lambda: answers(mapper_port))
        self.process = self._directory.start("rabbitmq", [programs / "rabbitmq-server"], env=self._env)
        self._wait()

    def _wait(self) -> None:
        self.process.wait_until(lambda: answers(self._port, _AMQP_GREETING, _METHOD_FRAME))


def _environment(directory: Path, port: int) -> dict[str, str]:
    plugins, settings = directory / "enabled_plugins", directory / "rabbitmq.conf"
    plugins.write_text("[].\n")
    settings.write_text("loopback_users.guest = true\ndisk_free_limit.absolute = 50MB\nlog.console.level = warning\n")
    return {
        "HOME": str(directory),  # of the Erlang cookie
        "ERL_EPMD_PORT": str(free_port()),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODENAME": f"piecework_{secrets.token_hex(4)}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(free_port()),
        "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
        "RABBITMQ_LOG_BASE": str(directory / "log"),
        "RABBITMQ_LOGS": "-",
        "RABBITMQ_PID_FILE": str(directory / "pid"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(plugins),
        "RABBITMQ_CONF_ENV_FILE": str(directory / "none.conf"),
        "RABBITMQ_CONFIG_FILE": str(settings),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none",
    }


def _programs() -> Path:
    """The plain scripts: Debian's wrappers on the path change the user."""
    try:
        return find_program("rabbitmq-server", Path("/usr/lib/rabbitmq/bin")).parent
    except ServerMissingError:
        raise ServerMissingError("RabbitMQ") from None
