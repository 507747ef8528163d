"""How a database would execute what it is asked: which rows are read, whatever there is of others."""

import contextlib
from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, event


@contextlib.contextmanager
def query_plans(tx: Connection, table: str) -> Iterator[list[str]]:
    """The plan of each query on this table that is made in the block."""
    made: list[tuple[str, Any]] = []
    plans: list[str] = []

    def note(_c: object, _cursor: object, statement: str, parameters: Any, *_: object) -> None:
        if f"FROM {table}" in statement:
            made.append((statement, parameters))

    event.listen(tx, "before_cursor_execute", note)
    yield plans
    event.remove(tx, "before_cursor_execute", note)
    explain = "EXPLAIN QUERY PLAN " if tx.dialect.name == "sqlite" else "EXPLAIN "
    for statement, parameters in made:
        plans.append("\n".join(str(row[-1]) for row in tx.exec_driver_sql(explain + statement, parameters)))
