"""The servers of a deployed service, each behind a proxy: killed and started again, stopped, emptied, cut off."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from tests.chaos.proxy import Proxy
from tests.servers import CephServer, PostgresServer, RabbitServer, ValkeyServer
from tests.servers.process import ServerProcess

BrokerKind = Literal["rabbitmq", "valkey"]


class Servers:
    """PostgreSQL, a broker and an S3 server.

    Attributes:
        links: the way to each, by the names that faults use.
        direct_urls: settings that name the servers themselves, not the proxies.
    """

    def __init__(self, broker: BrokerKind) -> None:
        self._database = PostgresServer()
        self._broker: RabbitServer | ValkeyServer = RabbitServer() if broker == "rabbitmq" else ValkeyServer()
        self._store = CephServer()
        self.direct_urls = {
            "PIECEWORK_DATABASE_URL": self._database.create_database(),
            "PIECEWORK_BROKER_URL": self._broker.url,
            "PIECEWORK_OBJECT_STORE_URL": self._store.create_bucket(),
        }
        self.links = {
            name: Proxy(_port(url))
            for name, url in zip(("database", "broker", "store"), self.direct_urls.values(), strict=True)
        }

    def urls(self) -> Mapping[str, str]:
        """Settings of the service: each server through its proxy."""
        return {
            variable: url.replace(f":{_port(url)}", f":{link.port}", 1)
            for (variable, url), link in zip(self.direct_urls.items(), self.links.values(), strict=True)
        }

    def process(self, name: str) -> ServerProcess:
        """The process of a server."""
        processes = {"database": self._database, "broker": self._broker}
        return processes[name].process if name in processes else self._store.gateway

    def restart(self, name: str, *, empty: bool = False) -> None:
        """Start a server again that was killed; only a broker may have lost everything."""
        if name == "database":
            self._database.restart()
        elif name == "store":
            self._store.restart_gateway()
        elif isinstance(self._broker, RabbitServer):
            self._broker.restart(empty=empty)
        else:
            self._broker.restart()

    def keep_logs(self, directory: Path) -> None:
        """Copy what the servers have logged, before `close` deletes it."""
        for name in self.links:
            shutil.copy(self.process(name).log, directory / f"server-{name}.log")

    def close(self) -> None:
        """Stop all."""
        for link in self.links.values():
            link.close()
        for server in (self._store, self._broker, self._database):
            server.close()


def _port(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None
    return port
