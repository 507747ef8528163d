"""Fixtures of the tests of the checks."""

from tests.fixtures import clock, database, migrated_sqlite, storage

__all__ = ["clock", "database", "migrated_sqlite", "storage"]
