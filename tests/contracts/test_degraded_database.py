"""A database that is full, busy, restarting or silent counts as unavailable, quickly; reads go on; it recovers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy

from storage import accounts, patience
from storage.database import Database
from storage.errors import DatabaseUnavailableError
from storage.migrate import migrate
from tests.factories import make_account


@pytest.fixture
def full(tmp_path: object) -> Iterator[Database]:
    """A SQLite database that may not grow any more, on every connection."""
    database = Database(f"sqlite:///{tmp_path}/piecework.db")
    migrate(database)

    @sqlalchemy.event.listens_for(database.engine, "begin")
    def limit(connection: sqlalchemy.Connection) -> None:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    yield database
    database.close()


def test_a_full_database_is_unavailable_for_writes_can_be_read_and_recovers(full: Database) -> None:
    # Given
    with full.begin() as tx:
        make_account(tx, "before")
    # When: more than the pages that there are can hold
    for _ in range(3):
        with pytest.raises(DatabaseUnavailableError, match="full"), full.begin() as tx:  # noqa: PT012
            for number in range(5_000):
                make_account(tx, f"{number:0100d}")
    # Then: nothing of it is there, and what was there can be read
    with full.read() as tx:
        assert [account.name for account in accounts.list_accounts(tx)] == ["before"]
    # And: there is room again
    sqlalchemy.event.listen(
        full.engine, "begin", lambda connection: connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
    )
    with full.begin() as tx:
        for number in range(5_000):
            make_account(tx, f"{number:0100d}")
    with full.read() as tx:
        assert len(accounts.list_accounts(tx)) == 5_001


@pytest.mark.servers
@pytest.mark.parametrize(
    ("sqlstate", "what"),
    [
        ("53100", "disk full"),
        ("53200", "out of memory"),
        ("53300", "too many connections"),
        ("57P01", "ended by an administrator"),
        ("57P02", "ended by a crash"),
        ("57P03", "starting up"),
        ("40001", "could not be serialized"),
        ("40P01", "deadlock"),
        ("55P03", "lock not available"),
        ("58030", "input or output failed"),
    ],
)
def test_what_postgresql_says_of_itself_counts_as_unavailable(postgres_url: str, sqlstate: str, what: str) -> None:
    # Given
    database = Database(postgres_url)
    # When
    with pytest.raises(DatabaseUnavailableError, match=what) as raised, database.begin() as tx:
        tx.exec_driver_sql(f"DO $$ BEGIN RAISE EXCEPTION '{what}' USING ERRCODE = '{sqlstate}'; END $$")
    # Then
    assert raised.value.retryable
    with database.begin() as tx:
        assert tx.exec_driver_sql("SELECT 1").scalar_one() == 1
    database.close()


@pytest.mark.servers
def test_a_server_with_too_many_connections_refuses_quickly_and_serves_again(fresh_database_url: str) -> None:
    # Given
    others, url = Database(fresh_database_url), sqlalchemy.make_url(fresh_database_url)
    name = url.database
    with others.begin() as tx:
        tx.exec_driver_sql(f'ALTER DATABASE "{name}" CONNECTION LIMIT 0')
        tx.exec_driver_sql(f"CREATE ROLE guest LOGIN PASSWORD '{url.password}'")
    guest = Database(url.set(username="guest").render_as_string(hide_password=False))
    # When
    with pytest.raises(DatabaseUnavailableError, match="too many connections"), guest.read():
        pass
    # Then
    with others.begin() as tx:
        tx.exec_driver_sql(f'ALTER DATABASE "{name}" CONNECTION LIMIT -1')
    with guest.read() as tx:
        assert tx.exec_driver_sql("SELECT 1").scalar_one() == 1
    guest.close()
    with others.begin() as tx:
        tx.exec_driver_sql("DROP ROLE guest")
    others.close()


@pytest.fixture
def stopped(fresh_database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Database, Callable[[], int]]]:
    """A database with half a second of patience, and a call that stops the process which serves its connection."""
    monkeypatch.setattr(patience, "ANSWER_S", 0.5)
    database = Database(fresh_database_url)
    with database.read() as tx:
        pid = int(tx.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())

    def stop() -> int:
        os.kill(pid, signal.SIGSTOP)
        return pid

    yield database, stop
    os.kill(pid, signal.SIGCONT)
    assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    database.close()


@pytest.mark.servers
def test_a_server_that_falls_silent_in_a_transaction_is_given_up(stopped: tuple[Database, Callable[[], int]]) -> None:
    database, stop = stopped
    with pytest.raises(DatabaseUnavailableError, match="has not answered"), database.begin() as tx:  # noqa: PT012
        stop()
        tx.exec_driver_sql("SELECT 1")
    with database.begin() as tx:
        assert tx.exec_driver_sql("SELECT 1").scalar_one() == 1


@pytest.mark.servers
def test_a_connection_that_fell_silent_while_idle_is_replaced_unseen(
    stopped: tuple[Database, Callable[[], int]],
) -> None:
    database, stop = stopped
    pid = stop()
    with database.begin() as tx:
        assert tx.exec_driver_sql("SELECT pg_backend_pid()").scalar_one() != pid


@pytest.mark.servers
def test_tables_may_take_as_long_to_change_as_they_need(
    fresh_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "ANSWER_S", 0.05)
    database = Database(fresh_database_url)
    with database.begin() as tx, patience.unhurried(tx):
        tx.exec_driver_sql("SELECT pg_sleep(0.3)")
    with pytest.raises(DatabaseUnavailableError), database.begin() as tx:
        tx.exec_driver_sql("SELECT pg_sleep(3)")
    database.close()
