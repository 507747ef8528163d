"""A service whose api, journal and engine are in this process, so that one operation can be followed through it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from api.downloads import UrlSigner
from api.health import Health
from api.services import Services, make_waiters
from api.settings import ApiSettings
from jobs.settings import JobsSettings
from storage import accounts
from tests.tiny_model import write_tiny_model
from tests.worker.harness import Engine, Service


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Rows, objects, an account and a base model."""
    model = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    made = Service(tmp_path_factory.mktemp("tour"), model)
    yield made
    made.storage.close()


@pytest.fixture(scope="module")
def door(service: Service) -> Iterator[TestClient]:
    """HTTP into the service, with a key of its account."""
    database = service.storage.database
    services = Services(
        settings=ApiSettings(poll_s=0.2),
        jobs_settings=JobsSettings(),
        storage=service.storage,
        submitter=service.submitter,
        waiters=make_waiters(database, safety_read_s=0.05),
        subscription=None,
        signer=UrlSigner.open(service.directory),
        health=Health(service.storage),
    )
    with database.begin() as tx:
        account = accounts.get_account(tx, "tests")
        secret = accounts.create_key(tx, account.id, name="tour", now=database.now(tx))
    with TestClient(create_app(services), headers={"X-API-Key": secret}) as client:
        yield client


@pytest.fixture(scope="module")
def engine(service: Service) -> Engine:
    """A worker that has not been told of anything yet."""
    return Engine(service, "worker").start()  # it leaves at a station of its own
