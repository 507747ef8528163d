"""The health check says what is wrong, quickly, and in words that give nothing away."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from api import health
from api.services import Services
from storage.errors import DatabaseUnavailableError, ObjectStoreUnavailableError
from storage.open import Storage
from tests.api.conftest import Account

PATIENCE_S = 60.0


@pytest.fixture
def look(alice: Account, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """The health check, asking anew each time."""
    monkeypatch.setattr(health, "FRESH_S", 0.0)

    def get() -> Any:
        answer = alice.http.get("/api/v1/healthz")
        return answer.status_code, answer.json()

    return get


def raising(error: Exception) -> Callable[[], Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


def test_all_is_well(look: Callable[[], Any]) -> None:
    assert look() == (200, {"status": "ok", "database": "ok", "object_store": "ok", "broker": "ok"})


@pytest.mark.parametrize(
    ("reason", "word"), [("connection refused at 10.0.0.7", "unavailable"), ("No space left on device", "full")]
)
def test_an_object_store_that_fails_is_named_while_operations_are_accepted_still(
    reason: str, word: str, look: Callable[[], Any], storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.objects, "put", raising(ObjectStoreUnavailableError("s3://10.0.0.7/b", reason)))
    assert look() == (200, {"status": "degraded", "database": "ok", "object_store": word, "broker": "ok"})
    # and: it is well again by itself
    monkeypatch.undo()
    monkeypatch.setattr(health, "FRESH_S", 0.0)
    assert look()[1]["status"] == "ok"


def test_a_database_that_is_away_is_503(
    look: Callable[[], Any], storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.database, "read", raising(DatabaseUnavailableError("postgresql://10.0.0.7", "gone")))
    status, report = look()
    assert (status, report["status"], report["database"]) == (503, "unavailable", "unavailable")
    assert "10.0.0.7" not in str(report)


def test_an_object_store_that_hangs_makes_nobody_wait(
    look: Callable[[], Any], storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    go_on, asked = threading.Event(), threading.Semaphore(0)

    def hang(*_: object) -> None:
        asked.release()
        assert go_on.wait(PATIENCE_S)

    monkeypatch.setattr(health, "ANSWER_S", 0.01)
    monkeypatch.setattr(storage.objects, "put", hang)
    # when
    answers = [look() for _ in range(3)]
    # then: only one thread hangs with it
    assert [report["object_store"] for _, report in answers] == ["slow"] * 3
    assert asked.acquire(timeout=PATIENCE_S)
    assert not asked.acquire(blocking=False)
    go_on.set()


def test_a_full_database_that_can_be_read_is_remembered_for_a_while(
    look: Callable[[], Any], services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    services.health.note(DatabaseUnavailableError("sqlite:///x", "database or disk is full"))
    assert look() == (200, {"status": "degraded", "database": "full", "object_store": "ok", "broker": "ok"})
    monkeypatch.setattr(health, "REMEMBERED_S", 0.0)
    assert look()[1]["database"] == "ok"
