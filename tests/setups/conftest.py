"""The service on each set-up, started once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker

from tests.setups.deployment import Deployment

SETUPS = ("embedded", "postgresql-rabbitmq-s3", "postgresql-redis-s3")


@pytest.fixture(scope="package", params=[pytest.param(name, marks=pytest.mark.processes) for name in SETUPS])
def deployment(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Iterator[Deployment]:
    """A running service."""
    directory = tmp_path_factory.mktemp(request.param)
    deployed = Deployment(directory, tiny_model, _urls(request, request.param))
    yield deployed
    deployed.close()


@pytest.fixture
def client(deployment: Deployment) -> Iterator[tinker.ServiceClient]:
    """The official SDK, connected."""
    with tinker.ServiceClient(base_url=deployment.url, api_key=deployment.api_key) as connected:
        yield connected


def _urls(request: pytest.FixtureRequest, setup: str) -> dict[str, str]:
    if setup == "embedded":
        return {}
    postgres, s3 = request.getfixturevalue("postgres"), request.getfixturevalue("s3")
    broker = request.getfixturevalue("rabbitmq_url" if "rabbitmq" in setup else "valkey_url")
    return {
        "PIECEWORK_DATABASE_URL": postgres.create_database(),
        "PIECEWORK_BROKER_URL": broker,
        "PIECEWORK_OBJECT_STORE_URL": s3.create_bucket(),
    }
