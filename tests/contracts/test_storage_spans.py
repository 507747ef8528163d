"""A checkpoint's span says from when to when its bytes were kept, and is written with its row."""

import contextlib
from datetime import UTC, datetime, timedelta

from sqlalchemy import Connection, insert, select

from storage import billing_tables, checkpoints, tables
from storage.database import Database
from storage.ids import CheckpointPath
from storage.migrate import migrate
from tests.factories import NOW, make_checkpoint, make_run

FIRST = "0003"
SPAN = billing_tables.storage_span
LATER = NOW + timedelta(hours=5)


def spans(tx: Connection) -> list[tuple[datetime, datetime | None]]:
    """Every span, oldest first."""
    return [(row.since, row.until) for row in tx.execute(select(SPAN).order_by(SPAN.c.id))]


def test_a_span_begins_with_its_checkpoint_and_ends_when_that_is_deleted(database: Database) -> None:
    with database.begin() as tx:
        # given
        run = make_run(tx)
        checkpoint = make_checkpoint(tx, run)
        assert spans(tx) == [(NOW, None)]
        # when
        checkpoints.remove(tx, run.account_id, checkpoint.path, now=LATER)
        # then
        assert spans(tx) == [(NOW, LATER)]


def test_a_checkpoint_that_replaces_another_has_a_span_of_its_own(database: Database) -> None:
    with database.begin() as tx:
        run = make_run(tx)
        for hours in range(3):
            make_checkpoint(tx, run, overwrite=True, now=NOW + timedelta(hours=hours))
        first, second, third = (NOW + timedelta(hours=hours) for hours in range(3))
        assert spans(tx) == [(first, second), (second, third), (third, None)]


def test_an_expired_checkpoint_was_kept_until_it_expired_however_late_it_is_swept(database: Database) -> None:
    with database.begin() as tx:
        run = make_run(tx)
        make_checkpoint(tx, run, expires_at=NOW + timedelta(hours=1))
        assert checkpoints.remove_expired(tx, now=LATER, limit=9) == 1
        make_checkpoint(tx, run, "taken again", expires_at=NOW + timedelta(hours=2))
        make_checkpoint(tx, run, "taken again", now=LATER)
        assert spans(tx) == [(NOW, NOW + timedelta(hours=1)), (NOW, NOW + timedelta(hours=2)), (LATER, None)]


def test_another_expiry_moves_the_end_but_never_into_the_past(database: Database) -> None:
    with database.begin() as tx:
        run = make_run(tx)
        path = make_checkpoint(tx, run).path
        moment = NOW + timedelta(hours=1)
        for expires_at, until in [(LATER, LATER), (None, None), (NOW, moment)]:
            checkpoints.set_expiry(tx, run.account_id, path, expires_at=expires_at, now=moment)
            assert spans(tx) == [(NOW, until)]


def test_a_checkpoint_that_is_not_committed_has_no_span(database: Database) -> None:
    # given
    with database.begin() as tx:
        run = make_run(tx)
    # when
    with contextlib.suppress(ZeroDivisionError), database.begin() as tx:
        make_checkpoint(tx, run)
        raise ZeroDivisionError
    # then
    with database.read() as tx:
        assert checkpoints.find(tx, CheckpointPath(run.id, "weights", "first"), now=NOW) is None
        assert spans(tx) == []


def test_checkpoints_of_an_earlier_version_are_kept_from_the_upgrade_on(empty_url: str) -> None:
    # given a database of the version before, with checkpoints that stay, will expire and have expired
    database = Database(empty_url)
    migrate(database, revision=FIRST)
    never, soon = None, datetime(9999, 1, 1, tzinfo=UTC)
    with database.begin() as tx:
        before = database.now(tx)
        row = {"account_id": "a", "project_id": None, "tags": [], "user_metadata": {}, "sdk_version": "1"}
        row |= {"id": "s", "created_at": NOW, "heartbeat_at": NOW}
        account = tables.account.c
        tx.execute(insert(tables.account).values({account.id: "a", account.name: "a", account.created_at: NOW}))
        tx.execute(insert(tables.session).values(row))
        tx.execute(insert(tables.run).values(_run()))
        for name, expires_at in [("stays", never), ("expires", soon), ("expired", NOW)]:
            tx.execute(insert(tables.checkpoint).values(_checkpoint(name, expires_at)))
    # when
    migrate(database)
    # then
    with database.read() as tx:
        found = spans(tx)
        assert [until for _, until in found] == [never, soon]
        assert all(before - timedelta(minutes=1) <= since <= database.now(tx) for since, _ in found)
    database.close()


def _run() -> dict[str, object]:
    values = {"id": "r", "account_id": "a", "session_id": "s", "model_seq_id": 0, "base_model": "m", "lora": {}}
    return {**values, "optimizer": "adamw", "user_metadata": {}, "created_at": NOW, "last_request_at": NOW}


def _checkpoint(name: str, expires_at: datetime | None) -> dict[str, object]:
    values = {"account_id": "a", "run_id": "r", "kind": "weights", "name": name, "base_model": "m", "lora": {}}
    facts = {"object_key": name, "files": {}, "size_bytes": 1, "user_metadata": {}, "created_at": NOW}
    return {**values, **facts, "expires_at": expires_at}
