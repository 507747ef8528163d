"""Joins settings, database and object store, once per process."""

from __future__ import annotations

from dataclasses import dataclass

from storage.clock import Clock
from storage.database import Database
from storage.object_url import open_object_store
from storage.objects import ObjectStore
from storage.payloads import PayloadStore
from storage.settings import StorageSettings


@dataclass(frozen=True)
class Storage:
    """What survives: rows, objects, and the payloads that lie in either."""

    settings: StorageSettings
    database: Database
    objects: ObjectStore
    payloads: PayloadStore

    def close(self) -> None:
        """Close all connections."""
        self.database.close()


def open_storage(settings: StorageSettings | None = None, *, clock: Clock | None = None) -> Storage:
    """Open database and object store as set in the environment; the tables must have been migrated."""
    settings = settings or StorageSettings()
    database = Database(settings.resolved_database_url(), clock=clock, sqlite_synchronous=settings.sqlite_synchronous)
    objects = open_object_store(settings.resolved_object_store_url())
    payloads = PayloadStore(
        database, objects, inline_bytes_max=settings.inline_bytes_max, upload_expiry_s=settings.upload_expiry_s
    )
    return Storage(settings, database, objects, payloads)
