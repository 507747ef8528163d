"""`python -m api`: one process that answers HTTP until it is told to stop."""

from __future__ import annotations

import contextlib
import resource
import socket
import sys
from types import FrameType

import uvicorn

from api.app import create_app
from api.services import Services, open_services
from storage.supervision import API_NAME, SUPERVISED, call_oneself, say_ready
from storage.telemetry import set_up_logging

GRACE_S = 5
BACKLOG = 2048
FILES_MAX = 65_536


class Server(uvicorn.Server):
    """Ends waiting polls when told to stop, so that nobody has to wait for them; clients poll again elsewhere."""

    def __init__(self, config: uvicorn.Config, services: Services) -> None:
        super().__init__(config)
        self._services = services

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to take requests; a supervisor is told."""
        await super().startup(sockets)
        if self.started and SUPERVISED in sys.argv[1:]:
            say_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, and let every waiting poll answer at once."""
        self._services.waiters.end()
        super().handle_exit(sig, frame)


def main() -> None:
    """Serve as set in the environment."""
    if SUPERVISED in sys.argv[1:]:
        call_oneself(API_NAME)
    set_up_logging("api")
    _raise_file_limit()
    services = open_services()
    config = uvicorn.Config(
        create_app(services),
        host=services.settings.host,
        port=services.settings.port,
        backlog=BACKLOG,
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=GRACE_S,
        timeout_keep_alive=75,
    )
    Server(config, services).run()


def _raise_file_limit() -> None:
    """Every waiting poll is a connection, and thousands may wait."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_MAX if hard == resource.RLIM_INFINITY else min(FILES_MAX, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    main()
