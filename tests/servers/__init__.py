"""Real servers for tests: PostgreSQL, RabbitMQ, Valkey and an S3 server (Ceph RGW).

Each starts on free loopback ports in a temporary directory of its own and dies with the process that started it, also
when that is killed. What a test may spoil it gets fresh: a database, a virtual host, a numbered Valkey database, a
bucket. A program that is missing is an error, never a skip: a test that did not run has not passed.
"""

from tests.servers.ceph import CephServer
from tests.servers.postgres import PostgresServer
from tests.servers.process import ServerMissingError, ServerStartError, free_port
from tests.servers.rabbitmq import RabbitServer
from tests.servers.valkey import ValkeyServer

__all__ = [
    "CephServer",
    "PostgresServer",
    "RabbitServer",
    "ServerMissingError",
    "ServerStartError",
    "ValkeyServer",
    "free_port",
]
