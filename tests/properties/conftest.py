"""Databases that are emptied for every history, SQLite and PostgreSQL; time is handed in on both."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy

from storage import tables
from storage.clock import FrozenClock
from storage.migrate import migrate
from storage.open import Storage, open_storage
from storage.settings import StorageSettings
from tests.fixtures import migrated_sqlite

__all__ = ["migrated_sqlite"]

UPLOAD_EXPIRY_S = 50.0
INLINE_BYTES_MAX = 150

Fresh = Callable[[], Storage]


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.servers)])
def kind(request: pytest.FixtureRequest) -> str:
    """Which database."""
    return str(request.param)


@pytest.fixture
def fresh_storage(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> Iterator[Fresh]:
    """Opens storage with nothing in it; the one opened before is closed."""
    opened, migrated = list[Storage](), list[str]()
    url = request.getfixturevalue("fresh_database_url") if kind == "postgres" else ""

    def open_fresh() -> Storage:
        if opened:
            opened.pop().close()
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        (tmp_path / "data").mkdir()
        if not url:
            shutil.copy(request.getfixturevalue("migrated_sqlite"), tmp_path / "data")
        settings = StorageSettings(
            data_dir=tmp_path / "data",
            database_url=url,
            object_store_url="",
            inline_bytes_max=INLINE_BYTES_MAX,
            upload_expiry_s=UPLOAD_EXPIRY_S,
        )
        storage = open_storage(settings, clock=FrozenClock())
        storage.database.now = lambda _: storage.database.clock.now()  # type: ignore[method-assign]
        if url and not migrated:
            migrate(storage.database)
            migrated.append(url)
        if url:
            _empty(storage)
        opened.append(storage)
        return storage

    yield open_fresh
    for storage in opened:
        storage.close()


def _empty(storage: Storage) -> None:
    names = ", ".join(table.name for table in tables.metadata.sorted_tables)
    with storage.database.begin() as tx:
        tx.execute(sqlalchemy.text(f"TRUNCATE {names} RESTART IDENTITY CASCADE"))
