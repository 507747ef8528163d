"""`with database.begin() as tx`: the only way to the rows.

What always holds: on SQLite every transaction begins with `BEGIN IMMEDIATE`, so a read that is followed by a write can
never lose a race; functions that write take a `tx` and never commit.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import Connection, event
from sqlalchemy.engine import make_url

from storage.clock import Clock, SystemClock
from storage.errors import DatabaseRefusedError, DatabaseUnavailableError
from storage.patience import PATIENCE, PatientConnection

POOL_S = 10.0
"""So long a connection is waited for when all are in use."""
SQLITE_BUSY_S = 20.0
SQLITE_RETRY_S = 0.005
POSTGRES_IDLE_S = 10.0
"""A process that stands still in the middle of a transaction holds what it has locked no longer than this.

The locks of one that was stopped, or that a network has cut off, would otherwise keep its runs from being taken over.
"""
READ_ONLY_SQLSTATE = "25006"
DRIVERS = frozenset({"sqlite", "sqlite+pysqlite", "postgresql", "postgresql+psycopg"})
_FORM = "write PIECEWORK_DATABASE_URL as postgresql+psycopg://user:password@host/database"
_AFTER_COMMIT = "piecework_after_commit"


class Database:
    """Connections to SQLite or PostgreSQL.

    Attributes:
        engine: SQLAlchemy's engine.
        clock: judges time on SQLite; PostgreSQL judges by its own.

    Raises:
        DatabaseRefusedError: the URL is wrong, or of another database; its password is not in the message.
    """

    def __init__(
        self, url: str, *, clock: Clock | None = None, sqlite_synchronous: str = "NORMAL", pool_size: int = 8
    ) -> None:
        parsed = _parsed(url)
        self.clock: Clock = clock or SystemClock()
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        if self.is_sqlite:
            self.engine = _sqlite_engine(parsed, sqlite_synchronous)
        else:
            self.engine = _postgres_engine(parsed, pool_size)
        self.url_without_password = parsed.render_as_string(hide_password=True)

    @contextlib.contextmanager
    def begin(self) -> Iterator[Connection]:
        """A transaction: committed at the end of the block, rolled back if it raises.

        Raises:
            DatabaseUnavailableError: the database cannot be reached; trying again may help. Whether a commit that
                raised it took effect is unknown: read back.
        """
        calls: list[Callable[[], None]] = []
        with self._translated(), self.engine.begin() as tx:
            yield tx.execution_options(**{_AFTER_COMMIT: calls})
        for call in calls:
            call()

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads; on SQLite it neither waits for a writer nor makes one wait."""
        with self._translated(), self.engine.connect() as connection:
            yield connection.execution_options(piecework_read_only=True)
            connection.rollback()

    def now(self, tx: Connection) -> datetime:
        """The database's time: every process asks the same clock, so leases do not depend on theirs."""
        if self.is_sqlite:
            return self.clock.now()
        value: datetime = tx.execute(sqlalchemy.text("SELECT clock_timestamp()")).scalar_one()
        return value.astimezone(UTC)

    def after(self, tx: Connection, seconds: float) -> datetime:
        """The database's time in `seconds`."""
        return self.now(tx) + timedelta(seconds=seconds)

    def for_update(self, query: sqlalchemy.Select[Any], *, skip_locked: bool = False) -> sqlalchemy.Select[Any]:
        """The query with its rows locked; SQLite's transactions hold the whole database already."""
        return query if self.is_sqlite else query.with_for_update(skip_locked=skip_locked)

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlalchemy.exc.TimeoutError as error:  # the pool's: all connections are in use
            raise DatabaseUnavailableError(self.url_without_password, str(error)) from error
        except sqlalchemy.exc.DBAPIError as error:
            away = (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InternalError)
            if not (isinstance(error, away) or error.connection_invalidated):
                raise
            if getattr(error.orig, "sqlstate", None) == READ_ONLY_SQLSTATE:
                self.engine.dispose()  # connections to a server that leads no more: the next ones find the new leader
            raise DatabaseUnavailableError(self.url_without_password, str(error.orig)) from error


def after_commit(tx: Connection, call: Callable[[], None]) -> None:
    """Call this once the transaction has been committed, and never if that is rolled back; savepoints do not count.

    If the database does not say whether the commit took effect, nothing is called.
    """
    tx.get_execution_options()[_AFTER_COMMIT].append(call)


def _parsed(url: str) -> sqlalchemy.URL:
    try:
        parsed = make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise DatabaseRefusedError(f"its URL cannot be read; {_FORM}") from None  # what it holds may be the password
    if parsed.drivername not in DRIVERS:
        raise DatabaseRefusedError(f"{parsed.drivername}:// is not supported; {_FORM}")
    return parsed


def _postgres_engine(url: sqlalchemy.URL, pool_size: int) -> sqlalchemy.Engine:
    engine = sqlalchemy.create_engine(
        url,
        pool_size=pool_size,
        max_overflow=2 * pool_size,
        pool_pre_ping=True,
        pool_timeout=POOL_S,
        isolation_level="READ COMMITTED",
    )

    @event.listens_for(engine, "do_connect")
    def _connect(_dialect: Any, _record: Any, arguments: Any, parameters: dict[str, Any]) -> Any:
        return PatientConnection.connect(*arguments, **{**PATIENCE, **parameters})

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET idle_in_transaction_session_timeout = {int(POSTGRES_IDLE_S * 1000)}")
        connection.commit()

    @event.listens_for(engine, "do_executemany")
    def _execute_many(cursor: Any, statement: Any, rows: Any, _context: Any) -> bool:
        # psycopg sends the rows in a pipeline. Its flush request, where the server reads it after the sync, stops the
        # server's clock for idle transactions: a process stopped right here would keep its locks for ever.
        cursor.executemany(statement, rows)
        cursor.connection.execute("SELECT 1")
        return True

    return engine


def _sqlite_engine(url: sqlalchemy.URL, synchronous: str) -> sqlalchemy.Engine:
    if url.database and url.database != ":memory:":
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    waiting = {"timeout": SQLITE_BUSY_S, "check_same_thread": False}
    pool = {} if url.database in (None, "", ":memory:") else {"pool_timeout": POOL_S}
    engine = sqlalchemy.create_engine(url, connect_args=waiting, **pool)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver must not begin transactions of its own
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {int(SQLITE_BUSY_S * 1000)}")
        _use_write_ahead_log(cursor)
        cursor.execute(f"PRAGMA synchronous = {synchronous}")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        read_only = connection.get_execution_options().get("piecework_read_only")
        connection.exec_driver_sql("BEGIN DEFERRED" if read_only else "BEGIN IMMEDIATE")

    return engine


def _use_write_ahead_log(cursor: sqlite3.Cursor) -> None:
    """Switch the file to WAL; of several who switch a new file at once SQLite refuses all but one, without waiting."""
    deadline = time.monotonic() + SQLITE_BUSY_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(SQLITE_RETRY_S)
