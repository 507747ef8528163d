"""Usage of a period as an object: made in a file, put under a fresh key, deleted by the sweeper when it expires.

The object is announced until it expires and never named by a row that needs it: nothing does but who downloads it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

import structlog
from sqlalchemy import select

from billing import export_files, storage_metering, usage_lines
from billing.budgets import Period, start_of_period
from billing.export_files import Format
from billing.settings import BillingSettings
from storage import keys, tables, uploads
from storage.database import Database
from storage.keys import KeyKind
from storage.objects import ObjectStore

log = structlog.get_logger()

SETTLED = timedelta(hours=1)
"""A day is exported so long after its end, or later: by then what it has used is committed."""


@dataclass(frozen=True)
class Export:
    """Which usage, and how it is written.

    Attributes:
        since, until: the end is not in it.
        account_id: None is all accounts.
    """

    since: datetime
    until: datetime
    format: Format
    account_id: str | None = None

    @property
    def filename(self) -> str:
        """What to call the file; two periods never share a name."""
        period = "-to-".join(f"{moment:%Y-%m-%dT%H-%M-%S.%f}" for moment in (self.since, self.until))
        return f"usage-{self.account_id or 'all'}-{period}.{self.format.suffix}"

    def num_lines(self, database: Database) -> int:
        """How many lines it has."""
        return usage_lines.count(database, since=self.since, until=self.until, account_id=self.account_id)

    def write(self, database: Database, file: BinaryIO, *, on_page: Callable[[int], None] = lambda _: None) -> None:
        """Write it to an open file, a page at a time."""
        pages = usage_lines.pages(database, since=self.since, until=self.until, account_id=self.account_id)
        told = export_files.counted(pages, on_page)
        export_files.write(file, told, self.format, source=BillingSettings().event_source)


def store(
    database: Database, objects: ObjectStore, export: Export, *, on_page: Callable[[int], None] = lambda _: None
) -> str:
    """Put an export into the object store; returns its key."""
    key = keys.export_key(_owner(export), export.filename)
    with tempfile.TemporaryDirectory(prefix="piecework-export-") as directory:
        path = Path(directory, "export")
        with path.open("wb") as file:
            export.write(database, file, on_page=on_page)
            file.flush()
            os.fsync(file.fileno())
        with database.begin() as tx:
            now = database.now(tx)
            expires_at = now + timedelta(days=BillingSettings().export_kept_days)
            uploads.announce(tx, key, now=now, expires_at=expires_at)
        objects.put(key, path)
    return key


def store_next_day(database: Database, objects: ObjectStore) -> str | None:
    """Put the next day that is over (UTC) into the object store, as settings say.

    That is the one after the last that is there, so days that no scheduler has seen are made up for; yesterday, if
    none is there. As long as its storage is not metered to its end, it is not exported, nor is any later one.

    Returns:
        The key; None if all are there, or the next one is not metered yet.
    """
    settings = BillingSettings()
    if settings.export_daily is None:
        return None
    with database.read() as tx:
        end = start_of_period(Period.DAY, database.now(tx) - SETTLED)
        days = [
            _day(end - timedelta(days=ago), Format(settings.export_daily)) for ago in range(settings.export_kept_days)
        ]
        row = tables.stored_object.c
        owned = row.key.startswith(keys.prefix(KeyKind.EXPORT, _owner(days[0])), autoescape=True)
        unmetered = storage_metering.next_hour(tx)
        put = [(keys.parse(key).filename, key) for key in tx.execute(select(row.key).where(owned)).scalars()]

    def is_missing(day: Export) -> bool:
        return not any(name == day.filename and objects.exists(key) for name, key in put)

    missing = list(takewhile(is_missing, days))  # the latest first
    if not missing:
        return None
    day = missing[-1] if len(missing) < len(days) else days[0]
    if unmetered is not None and unmetered < day.until:
        log.info("export_waits_for_storage", until=day.until.isoformat(), unmetered=unmetered.isoformat())
        return None
    return store(database, objects, day)


def _day(until: datetime, file_format: Format) -> Export:
    return Export(until - timedelta(days=1), until, file_format)


def _owner(export: Export) -> str:
    return f"usage-{export.account_id or 'all'}"
