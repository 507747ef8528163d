"""The HTTP service in this process, on SQLite in a temporary directory; a worker is played by the tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from api.downloads import UrlSigner
from api.health import Health
from api.services import Services, make_waiters
from api.settings import ApiSettings
from jobs import operations
from jobs.backlog import Backlog
from jobs.operations import Outcome
from jobs.settings import JobsSettings
from jobs.submit import Submitter
from storage import accounts, base_models, journal, workers
from storage.base_models import BaseModel
from storage.migrate import migrate
from storage.open import Storage, open_storage
from storage.payloads import Stored
from storage.settings import StorageSettings
from tests.announcements import Announcements

VOCAB, CONTEXT = 100, 16
MODEL = "Qwen/Qwen3-tiny"


@dataclass(frozen=True)
class Account:
    """An account with a key, and a client that presents it."""

    id: str
    secret: str
    http: TestClient

    def post(self, path: str, json: Any = None, **kwargs: Any) -> Any:
        headers = {"X-API-Key": self.secret} | kwargs.pop("headers", {})
        return self.http.post(f"/api/v1/{path}", json=json, headers=headers, **kwargs)

    def get(self, path: str, **kwargs: Any) -> Any:
        return self.http.get(f"/api/v1/{path}", headers={"X-API-Key": self.secret}, **kwargs)

    def request(self, method: str, path: str, json: Any = None) -> Any:
        return self.http.request(method, f"/api/v1/{path}", json=json, headers={"X-API-Key": self.secret})

    def retrieve(self, request_id: str, accept: str = "application/json") -> Any:
        body = {"request_id": request_id, "allow_metadata_only": True}
        return self.post("retrieve_future", body, headers={"Accept": accept})

    def session(self) -> str:
        body = {"tags": [], "user_metadata": {}, "sdk_version": "0.38.0", "type": "create_session"}
        return str(self.post("create_session", body).json()["session_id"])

    def run(self, session: str | None = None, **changes: Any) -> str:
        """A run that was accepted; its operation 0 waits."""
        body = {"session_id": session or self.session(), "model_seq_id": 0, "base_model": MODEL, "type": "create_model"}
        answer = self.post("create_model", body | changes)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["model_id"])


@pytest.fixture(scope="session")
def prepared_data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with the tables and one base model, to be copied."""
    directory = tmp_path_factory.mktemp("prepared")
    opened = open_storage(StorageSettings(data_dir=directory))
    migrate(opened.database)
    with opened.database.begin() as tx:
        base_models.add_base_model(tx, a_base_model(MODEL))
    opened.close()
    return directory


@pytest.fixture
def storage(prepared_data_dir: Path, tmp_path: Path) -> Iterator[Storage]:
    data_dir = shutil.copytree(prepared_data_dir, tmp_path / "data")
    opened = open_storage(StorageSettings(data_dir=data_dir, sqlite_synchronous="NORMAL"))
    yield opened
    opened.close()


def a_base_model(name: str) -> BaseModel:
    return BaseModel(
        name=name,
        source="/somewhere",
        tokenizer_id=name,
        architecture="Qwen3ForCausalLM",
        dtype="float32",
        context_length=CONTEXT,
        vocab_size=VOCAB,
        num_parameters=1000,
        tied_embeddings=True,
        files={},
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
    )


@pytest.fixture
def announcements() -> Announcements:
    return Announcements()


@pytest.fixture
def jobs_settings() -> JobsSettings:
    return JobsSettings()


@pytest.fixture
def services(storage: Storage, announcements: Announcements, jobs_settings: JobsSettings) -> Services:
    return Services(
        settings=ApiSettings(poll_s=0.05, body_bytes_max=20_000, json_bytes_max=20_000),
        jobs_settings=jobs_settings,
        storage=storage,
        submitter=Submitter(storage, announcements, Backlog.of(storage.database, jobs_settings)),
        waiters=make_waiters(storage.database, safety_read_s=0.05),
        subscription=None,
        signer=UrlSigner.open(storage.settings.data_dir),
        health=Health(storage),
    )


@pytest.fixture
def http(services: Services) -> Iterator[TestClient]:
    with TestClient(create_app(services), raise_server_exceptions=False, follow_redirects=False) as client:
        yield client


@pytest.fixture
def make_account(storage: Storage, http: TestClient) -> Callable[[str], Account]:
    def make(name: str) -> Account:
        with storage.database.begin() as tx:
            now = storage.database.now(tx)
            account = accounts.create_account(tx, name, now=now)
            secret = accounts.create_key(tx, account.id, name="key", now=now)
        return Account(account.id, secret, http)

    return make


@pytest.fixture
def alice(make_account: Callable[[str], Account]) -> Account:
    return make_account("alice")


@pytest.fixture
def bob(make_account: Callable[[str], Account]) -> Account:
    return make_account("bob")


@pytest.fixture
def complete(storage: Storage) -> Callable[[str, Outcome], None]:
    """Play the worker: give an operation its outcome."""

    def finish(request_id: str, outcome: Outcome) -> None:
        encoded = operations.encode(outcome)
        with storage.database.begin() as tx:
            operation = journal.get_operation(tx, request_id)
            now = storage.database.now(tx)
            stored = Stored(inline=encoded, size_bytes=len(encoded))
            journal.complete(tx, operation, stored, worker_id="w", now=now)

    return finish


@pytest.fixture
def a_worker_runs(storage: Storage) -> None:
    with storage.database.begin() as tx:
        workers.register(tx, worker_id="w", host="h", pid=1, device="cpu", now=storage.database.now(tx))
