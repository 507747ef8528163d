"""Services of real processes that the promises' tests share: starting one takes longer than most tests."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker

from tests.promises.kit import PatientWire, billed
from tests.servers import CephServer, PostgresServer, RabbitServer
from tests.setups.deployment import Deployment
from tests.wire.conftest import TIMEOUT_S

SHORT_LEASES = {"PIECEWORK_LEASE_S": "3", "PIECEWORK_SWEEP_S": "0.5"}
SMALL_ROWS = {"PIECEWORK_INLINE_BYTES_MAX": "1500"}
"""So that payloads and results of the program lie in the object store, those of an optimizer step in the row."""

DISTURBED = {
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).with_name("disturbed")), os.environ.get("PYTHONPATH", "")])
}
"""Loads `disturbed/sitecustomize.py` into a process."""
POISON = str(Path(__file__).parents[1] / "setups" / "poison" / "sitecustomize.py")
GAP_TIMEOUT_S = 1
QUEUED_MAX = 3
TRAINING_FACTOR = 2
BODY_BYTES_MAX = 6000
CONSUMER_TIMEOUT_S = 8
"""RabbitMQ's own default is half an hour; a task's slice is shorter than even this."""

Connect = Callable[..., PatientWire]


@pytest.fixture(scope="package")
def messages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that says, while it is there, how often each message of the embedded service is sent."""
    return tmp_path_factory.mktemp("messages") / "copies"


@pytest.fixture(scope="package")
def embedded(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, messages: Path) -> Iterator[Deployment]:
    """`piecework serve`, with short leases."""
    directory = tmp_path_factory.mktemp("embedded")
    disturbed = {**DISTURBED, "DISTURBED_MESSAGES": str(messages), "DISTURBED_POISON": POISON}
    settings = {**SHORT_LEASES, **SMALL_ROWS, **disturbed}
    deployed = Deployment(directory, tiny_model, settings=settings)
    yield deployed
    deployed.close()


@pytest.fixture(scope="package")
def deployed(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    postgres: PostgresServer,
    s3: CephServer,
    rabbitmq: RabbitServer,
) -> Iterator[Deployment]:
    """Its parts on PostgreSQL, RabbitMQ and an S3 server, with short leases too."""
    rabbitmq.set_consumer_timeout(CONSUMER_TIMEOUT_S)
    urls = {
        "PIECEWORK_DATABASE_URL": postgres.create_database(),
        "PIECEWORK_BROKER_URL": rabbitmq.create_virtual_host(),
        "PIECEWORK_OBJECT_STORE_URL": s3.create_bucket(),
    }
    deployed = Deployment(tmp_path_factory.mktemp("deployed"), tiny_model, urls, settings=SMALL_ROWS)
    yield deployed
    deployed.close()


@pytest.fixture(scope="package")
def strict(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Deployment]:
    """A service with low limits that closes gaps soon."""
    settings = {
        **SHORT_LEASES,
        "PIECEWORK_GAP_TIMEOUT_S": str(GAP_TIMEOUT_S),
        "PIECEWORK_QUEUED_MAX_PER_ACCOUNT": str(QUEUED_MAX),
        "PIECEWORK_QUEUED_TRAINING_FACTOR": str(TRAINING_FACTOR),
        "PIECEWORK_BODY_BYTES_MAX": str(BODY_BYTES_MAX),
        "PIECEWORK_JSON_BYTES_MAX": str(BODY_BYTES_MAX),
    }
    deployed = Deployment(tmp_path_factory.mktemp("strict"), tiny_model, settings=settings)
    yield deployed
    deployed.close()


@pytest.fixture
def service(embedded: Deployment) -> Iterator[Deployment]:
    """The embedded service, healthy, and with no point armed."""
    embedded.wait_until_healthy()
    yield embedded
    embedded.disarm()


@pytest.fixture(scope="package")
def undisturbed(embedded: Deployment) -> tuple[list[Any], list[list[tuple[Any, ...]]]]:
    """Results and amounts billed of the program, operation by operation, when nothing happens to it."""
    with _connecting() as connect:
        wire = connect(embedded)
        run = wire.run()
        results = wire.run_program(run)
    return results, [operation.amounts for operation in billed(embedded, run=run)[1:]]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Opens sessions: `connect(deployment)`, with another account's key `connect(deployment, api_key)`."""
    with _connecting() as connect:
        yield connect


@contextlib.contextmanager
def _connecting() -> Iterator[Connect]:
    with contextlib.ExitStack() as opened:

        def connect(deployment: Deployment, api_key: str = "") -> PatientWire:
            headers = {"X-API-Key": api_key or deployment.api_key}
            http = opened.enter_context(httpx.Client(base_url=deployment.url, headers=headers, timeout=TIMEOUT_S))
            body = {"tags": [], "user_metadata": {}, "sdk_version": "0.38.0", "type": "create_session"}
            session = PatientWire(http, "").post("create_session", body).json()["session_id"]
            return PatientWire(http, session)

        yield connect


@pytest.fixture
def wire(service: Deployment, connect: Connect) -> PatientWire:
    """A session on the embedded service."""
    return connect(service)


@pytest.fixture
def client(service: Deployment) -> Iterator[tinker.ServiceClient]:
    """The official SDK, connected to the embedded service."""
    with tinker.ServiceClient(base_url=service.url, api_key=service.api_key) as connected:
        yield connected
