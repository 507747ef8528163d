"""Storage on SQLite for every test of this folder."""

from tests.fixtures import clock, database, migrated_sqlite, storage

__all__ = ["clock", "database", "migrated_sqlite", "storage"]
