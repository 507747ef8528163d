"""Storage as commands use it: opened for a data directory, brought up to date, closed at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from storage.migrate import migrate
from storage.open import Storage, open_storage
from storage.settings import StorageSettings


@contextlib.contextmanager
def opened(data_dir: Path) -> Iterator[Storage]:
    """Open database and object store, the tables made where there are none yet; works whether `serve` runs or not."""
    data_dir.mkdir(parents=True, exist_ok=True)
    storage = open_storage(StorageSettings(data_dir=data_dir))
    try:
        migrate(storage.database)
        yield storage
    finally:
        storage.close()
