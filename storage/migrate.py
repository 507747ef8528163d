"""Brings a database to the newest tables. Several processes may start it at once: one does the work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from storage.database import Database
from storage.patience import unhurried

_LOCK = 7_263_511_901  # any number, as long as only migrations use it


def migrate(database: Database, *, revision: str = "head") -> None:
    """Upgrade, to the newest revision unless another is named; does nothing if the database is there already."""
    if is_current(database):
        return
    with database.begin() as tx, unhurried(tx):
        if not database.is_sqlite:
            tx.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        command.upgrade(_config(tx), revision)


def is_current(database: Database) -> bool:
    """Whether the tables are those of this release."""
    with database.read() as tx:
        return MigrationContext.configure(tx).get_current_revision() == newest_revision()


def revisions() -> Sequence[str]:
    """All there have been, oldest first."""
    scripts = ScriptDirectory.from_config(_config(None))
    return [script.revision for script in scripts.walk_revisions()][::-1]


def newest_revision() -> str | None:
    """The revision this release works with."""
    return ScriptDirectory.from_config(_config(None)).get_current_head()


def _config(tx: Connection | None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = tx
    return config
