"""Storage as commands use it: opened for a data directory, brought up to date, closed at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from api.cli.errors import CliError
from storage.migrate import migrate
from storage.open import Storage, open_storage
from storage.settings import StorageSettings


@contextlib.contextmanager
def opened(data_dir: Path, *, create: bool = False) -> Iterator[Storage]:
    """Open database and object store, brought up to date; works whether `serve` runs or not.

    Args:
        create: make a database where there is none yet.

    Raises:
        CliError: there is none.
    """
    settings = StorageSettings(data_dir=data_dir)
    if not create and not settings.has_database():
        raise CliError(
            f"there is no database in {data_dir} yet: start `piecework serve --data-dir {data_dir}`, or name the "
            "service's directory with --data-dir or PIECEWORK_DATA_DIR"
        )
    data_dir.mkdir(parents=True, exist_ok=True)
    storage = open_storage(settings)
    try:
        migrate(storage.database)
        yield storage
    finally:
        storage.close()
