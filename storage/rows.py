"""How rows are added that may be there already, and found by the index that fits."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, Table
from sqlalchemy.dialects import postgresql, sqlite


def insert_if_absent(tx: Connection, table: Table, **values: Any) -> bool:
    """Add a row unless one of its unique columns is taken: of two processes that add the same one, both go on.

    On PostgreSQL it waits for a transaction that is adding the same row, so that a read after it finds that one's.

    Returns:
        Whether the row is new.
    """
    dialect = sqlite if tx.dialect.name == "sqlite" else postgresql
    added = dialect.insert(table).values(**values).on_conflict_do_nothing().returning(*table.primary_key)
    return tx.execute(added).first() is not None  # rowcount is -1 where the driver returns the new id by itself


def without_index(column: Column[str]) -> ColumnElement[str]:
    """The column's value for a condition that holds, but that no index is chosen by.

    SQLite knows nothing of how rows are spread: of an account's index and a run's it may take the account's, and read
    all of its history.
    """
    return column.concat("")
