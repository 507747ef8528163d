"""Storage on SQLite for every test of this folder, and the service that the engine's loop is tested on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures import clock, database, migrated_sqlite, storage
from tests.worker.harness import Engine, Service

__all__ = ["clock", "database", "migrated_sqlite", "storage"]


@pytest.fixture
def service(tmp_path: Path, tiny_model: Path) -> Iterator[Service]:
    """Rows, objects, an account, a session and a base model."""
    made = Service(tmp_path, tiny_model)
    yield made
    made.storage.close()


@pytest.fixture
def engine(service: Service) -> Iterator[Engine]:
    """A worker's engine that runs."""
    started = Engine(service, "worker-a").start()
    yield started
    started.leave()
