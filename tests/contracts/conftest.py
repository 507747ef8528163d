"""Databases of the contracts: SQLite in a file and PostgreSQL, migrated once, empty for every test."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy

from storage import tables
from storage.clock import FrozenClock
from storage.database import Database
from storage.migrate import migrate
from tests.fixtures import migrated_sqlite
from tests.servers import PostgresServer

__all__ = ["migrated_sqlite"]


@pytest.fixture(scope="session")
def migrated_postgres(postgres: PostgresServer) -> Iterator[str]:
    """URL of a PostgreSQL database with all tables."""
    url = postgres.create_database()
    database = Database(url)
    migrate(database)
    database.close()
    yield url
    postgres.drop_database(url)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.servers)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A database with all tables and no rows; after the test no connection may be in use."""
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("migrated_sqlite"), tmp_path / "piecework.db")
        opened = Database(f"sqlite:///{tmp_path / 'piecework.db'}", clock=FrozenClock())
    else:
        opened = Database(request.getfixturevalue("migrated_postgres"))
        names = ", ".join(table.name for table in tables.metadata.sorted_tables)
        with opened.begin() as tx:
            tx.execute(sqlalchemy.text(f"TRUNCATE {names} RESTART IDENTITY CASCADE"))
    yield opened
    assert opened.engine.pool.checkedout() == 0, "a connection leaked"  # type: ignore[attr-defined]
    opened.close()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.servers)])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a database without tables."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'empty.db'}"
    return str(request.getfixturevalue("fresh_database_url"))
