"""Fixtures that all tests share: a tiny base model, and real servers, started when the first test asks for one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import CephServer, PostgresServer, RabbitServer, ValkeyServer


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of ours."""
    parser.addoption("--object-store-url", help="run the object store's contract on this store instead of our own")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random base model."""
    from tests.tiny_model import write_tiny_model  # brings torch, which most tests do without

    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A running PostgreSQL."""
    server = PostgresServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def rabbitmq() -> Iterator[RabbitServer]:
    """A running RabbitMQ."""
    server = RabbitServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def valkey() -> Iterator[ValkeyServer]:
    """A running Valkey."""
    server = ValkeyServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def s3() -> Iterator[CephServer]:
    """A running S3 server."""
    server = CephServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def postgres_url(postgres: PostgresServer) -> str:
    """SQLAlchemy URL of the server's own database, which all tests share."""
    return postgres.url


@pytest.fixture
def fresh_database_url(postgres: PostgresServer) -> Iterator[str]:
    """SQLAlchemy URL of an empty PostgreSQL database that is this test's alone."""
    url = postgres.create_database()
    yield url
    postgres.drop_database(url)


@pytest.fixture(scope="session")
def rabbitmq_url(rabbitmq: RabbitServer) -> str:
    """Broker URL of the virtual host that all tests share."""
    return rabbitmq.url


@pytest.fixture
def fresh_rabbitmq_url(rabbitmq: RabbitServer) -> str:
    """Broker URL of an empty virtual host that is this test's alone."""
    return rabbitmq.create_virtual_host()


@pytest.fixture(scope="session")
def valkey_url(valkey: ValkeyServer) -> str:
    """Broker URL of the Valkey database that all tests share."""
    return valkey.url


@pytest.fixture
def fresh_valkey_url(valkey: ValkeyServer) -> str:
    """Broker URL of an empty Valkey database that is this test's alone."""
    return valkey.create_database()


@pytest.fixture(scope="session")
def s3_url(s3: CephServer) -> str:
    """URL of the S3 server without a bucket: `s3://ACCESS:SECRET@host:port`."""
    return s3.url


@pytest.fixture
def fresh_bucket_url(s3: CephServer) -> Iterator[str]:
    """Object store URL of an empty bucket that is this test's alone."""
    url = s3.create_bucket()
    yield url
    s3.delete_bucket(url)
