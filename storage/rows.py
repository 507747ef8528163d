"""A row that may be there already: two processes that add the same one at once both go on, with the first one's."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Table
from sqlalchemy.dialects import postgresql, sqlite


def insert_if_absent(tx: Connection, table: Table, **values: Any) -> bool:
    """Add a row unless one of its unique columns is taken.

    On PostgreSQL it waits for a transaction that is adding the same row, so that a read after it finds that one's.

    Returns:
        Whether the row is new.
    """
    dialect = sqlite if tx.dialect.name == "sqlite" else postgresql
    added = dialect.insert(table).values(**values).on_conflict_do_nothing().returning(*table.primary_key)
    return tx.execute(added).first() is not None  # rowcount is -1 where the driver returns the new id by itself
