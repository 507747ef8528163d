"""A checkpoint's span says from when to when its bytes were kept, and is written with its row."""

import contextlib
from datetime import datetime, timedelta

from sqlalchemy import Connection, select

from storage import billing_tables, checkpoints
from storage.database import Database
from storage.ids import CheckpointPath
from tests.factories import NOW, make_checkpoint, make_run

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
