"""A base model that cannot be loaded fails operations only if that is the model's fault."""

from __future__ import annotations

import errno

import pytest

from storage.errors import ObjectStoreUnavailableError
from tests.worker.harness import Engine, Service
from worker import residency, takeover
from worker.errors import ModelUnavailableError
from worker.takeover import Takeover


def _fetch(service: Service, engine: Engine) -> Takeover:
    run, lease = takeover.acquire(service.storage, service.create_run().id, worker_id=engine.name, lease_s=60)
    return takeover.fetch(service.storage, engine.models, run, lease, in_use=())


@pytest.fixture
def cold(service: Service) -> Engine:
    """A worker that has loaded no base model."""
    return Engine(service, "cold")


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.ENOSPC, "no space left"), ObjectStoreUnavailableError("s3", "away")]
)
def test_what_this_worker_wants_for_fails_no_operation(
    service: Service, cold: Engine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    # given a worker without memory, or without room for the files, or whose store is away for a moment
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(residency, "fetch_files", fail)

    # when it takes a run
    with pytest.raises((ModelUnavailableError, ObjectStoreUnavailableError)):
        _fetch(service, cold)

    # then it may be tried again, and succeeds once there is room
    monkeypatch.undo()
    assert _fetch(service, cold).model is not None


def test_a_base_model_that_is_broken_is_what_operations_fail_with(
    service: Service, cold: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given files that are no base model
    def fail(*_: object) -> None:
        raise ValueError("no weights in there")

    monkeypatch.setattr(residency, "fetch_files", fail)

    # when a worker takes a run
    fetched = _fetch(service, cold)

    # then that is the reason of its operations
    assert "no weights in there" in str(fetched.model_error)
