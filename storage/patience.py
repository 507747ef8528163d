"""A connection to PostgreSQL that gives up on a server that says nothing.

libpq waits for ever for a server that has accepted a connection and then stands still: stopped, swapped out, behind a
network that drops packets. Whoever waits so long holds a thread, and a client that gives up sooner.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from sqlalchemy import Connection

CONNECT_S = 5
ANSWER_S = 20.0
"""For one statement."""
MIGRATION_S = 3600.0
PATIENCE = {
    "connect_timeout": CONNECT_S,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": int(ANSWER_S * 1000),
}
"""libpq's own settings, for servers and networks that are gone."""

T = TypeVar("T")


class PatientConnection(psycopg.Connection[Any]):
    """A connection that is closed when a statement is not answered in time; its effect is unknown then."""

    answer_s: float | None = None

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """Wait for the server."""
        if timeout is None:
            timeout = ANSWER_S if self.answer_s is None else self.answer_s
        deadline = time.monotonic() + timeout
        try:
            return super().wait(gen, interval, timeout)
        except psycopg.OperationalError as error:
            if time.monotonic() < deadline:
                raise
            self.close()
            raise psycopg.OperationalError(f"the server has not answered for {timeout:.0f} s") from error


@contextlib.contextmanager
def unhurried(tx: Connection) -> Iterator[None]:
    """Let statements of this transaction take long: those that change tables do, and those that add up a large bill."""
    connection = tx.connection.driver_connection
    if not isinstance(connection, PatientConnection):
        yield
        return
    connection.answer_s = MIGRATION_S
    try:
        yield
    finally:
        connection.answer_s = None
