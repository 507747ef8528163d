"""Fixtures for tests on rows: a migrated SQLite database, a directory of objects, a clock that stands."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.clock import FrozenClock
from storage.database import Database
from storage.migrate import migrate
from storage.open import Storage, open_storage
from storage.settings import StorageSettings

INLINE_BYTES_MAX = 1_000


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database file with all tables, to be copied."""
    path = tmp_path_factory.mktemp("migrated") / "piecework.db"
    database = Database(f"sqlite:///{path}")
    migrate(database)
    database.close()
    return path


@pytest.fixture
def clock() -> FrozenClock:
    """A clock that moves only when told to."""
    return FrozenClock()


@pytest.fixture
def storage(migrated_sqlite: Path, tmp_path: Path, clock: FrozenClock) -> Iterator[Storage]:
    """Storage with nothing in it, as the embedded service has it."""
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    shutil.copy(migrated_sqlite, data_dir)
    settings = StorageSettings(
        data_dir=data_dir, database_url="", object_store_url="", inline_bytes_max=INLINE_BYTES_MAX
    )
    opened = open_storage(settings, clock=clock)
    yield opened
    opened.close()


@pytest.fixture
def database(storage: Storage) -> Database:
    """The database of `storage`."""
    return storage.database
