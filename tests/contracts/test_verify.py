"""Every charge is held against its usage: what is altered behind the ledger's back is found."""

import contextlib
from collections.abc import Iterator
from datetime import timedelta

import pytest
import sqlalchemy
from sqlalchemy import Connection

from billing import closing, ledger, rate_cards, verify
from billing.charging import BOOKED_LATE
from billing.dimensions import Dimensions
from billing.ledger import EntryKind, NewEntry
from billing.verify import Wrong
from storage import billing_tables, tables
from storage.database import Database
from tests.factories import NOW, bill, make_operation, make_run, make_usage

ENTRY, USAGE = billing_tables.ledger_entry, billing_tables.usage_record
CARD = '[device_seconds]\n"*" = "{}"\n'


def make_bill(tx: Connection) -> list[int]:
    """Three charged operations, the last one at another price; their ids."""
    run = make_run(tx)
    rate_cards.add(tx, CARD.format("0.5"), now=NOW - timedelta(hours=2))
    rate_cards.add(tx, CARD.format("0.7"), now=NOW, effective_at=NOW + timedelta(hours=1))
    operations = [make_operation(tx, run, seq) for seq in range(3)]
    for hour, operation in enumerate(operations):
        bill(tx, run, operation, make_usage(device_ns=10**9), now=NOW + timedelta(hours=hour))
    return [operation.id for operation in operations]


@contextlib.contextmanager
def altered(database: Database) -> Iterator[Connection]:
    """A transaction without the guards of the ledger, as somebody who alters the bill would make it; rolled back."""
    on = "" if database.is_sqlite else " ON ledger_entry"
    with database.engine.connect() as tx:
        for what in ("not_edited", "not_deleted"):
            tx.execute(sqlalchemy.text(f"DROP TRIGGER ledger_entry_{what}{on}"))
        yield tx
        tx.rollback()


def found(tx: Connection) -> list[tuple[Wrong, str]]:
    return [(each.wrong, each.source) for each in verify.differences(tx, page_rows=2)]


@pytest.mark.parametrize("page_rows", [1, 2, 3, 1_000])
def test_a_bill_as_it_was_written_has_no_difference(database: Database, page_rows: int) -> None:
    # Given
    with database.begin() as tx:
        make_bill(tx)
    # When
    seen: list[int] = []
    with database.read() as tx:
        differences = list(verify.differences(tx, page_rows=page_rows, seen=seen.append))
        # Then
        assert differences == []
        assert sum(seen) == verify.num_rows(tx) == 6


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"amount": 500_000_000_001}, Wrong.AMOUNT),
        ({"rate_card_id": None}, Wrong.CARD),
        ({"project_id": "another"}, Wrong.DIMENSIONS),
        ({"source": "operation:0"}, Wrong.SOURCE),
        ({"created_at": NOW}, Wrong.TIME),
    ],
)
def test_a_deliberately_altered_charge_is_found(database: Database, change: dict[str, object], wrong: Wrong) -> None:
    # Given
    with database.begin() as tx:
        operation_id = make_bill(tx)[1]
    with altered(database) as tx:
        # When
        tx.execute(sqlalchemy.update(ENTRY).where(ENTRY.c.operation_id == operation_id).values(**change))
        # Then
        assert found(tx) == [(wrong, f"operation:{operation_id}")]


@pytest.mark.parametrize(
    ("note", "late", "wrong"),
    [
        (BOOKED_LATE, timedelta(), []),
        (BOOKED_LATE, timedelta(days=9), []),
        (BOOKED_LATE, -timedelta(microseconds=1), [Wrong.TIME]),
        ("another", timedelta(days=9), [Wrong.TIME]),
        (None, timedelta(microseconds=1), [Wrong.TIME]),
    ],
)
def test_only_a_charge_that_says_so_may_be_booked_late(
    database: Database, note: str | None, late: timedelta, wrong: list[Wrong]
) -> None:
    # Given
    with database.begin() as tx:
        operation_id = make_bill(tx)[1]
    with altered(database) as tx:
        # When
        change = sqlalchemy.update(ENTRY).where(ENTRY.c.operation_id == operation_id)
        tx.execute(change.values(note=note, created_at=NOW + timedelta(hours=1) + late))
        # Then
        assert [each for each, _ in found(tx)] == wrong


def test_a_charge_that_was_taken_away_is_found(database: Database) -> None:
    # Given
    with database.begin() as tx:
        gone = make_bill(tx)[2]
    with altered(database) as tx:
        # When
        tx.execute(sqlalchemy.delete(ENTRY).where(ENTRY.c.operation_id == gone))
        # Then
        assert found(tx) == [(Wrong.MISSING, f"operation:{gone}")]


def test_a_charge_without_usage_is_found_and_a_top_up_is_none(database: Database) -> None:
    # Given
    with database.begin() as tx:
        make_bill(tx)
        account_id = tx.execute(sqlalchemy.select(USAGE.c.account_id).limit(1)).scalar_one()
        # When
        ledger.append(tx, [NewEntry(EntryKind.CHARGE, "made up", Dimensions(account_id), 1)], now=NOW)
        ledger.append(tx, [NewEntry(EntryKind.TOP_UP, "topup:1", Dimensions(account_id), -1)], now=NOW)
        # Then
        assert found(tx) == [(Wrong.WITHOUT_USAGE, "made up")]


def test_a_completed_operation_that_was_never_billed_is_found(database: Database) -> None:
    # Given
    with database.begin() as tx:
        run = make_run(tx)
        operation = make_operation(tx, run)
        assert found(tx) == []
        # When
        tx.execute(sqlalchemy.update(tables.operation).values(status="completed"))
        # Then
        assert found(tx) == [(Wrong.UNBILLED, f"operation:{operation.id}")]


def test_an_entry_that_was_moved_between_invoices_is_found(database: Database) -> None:
    # given two invoices
    with database.begin() as tx:
        make_bill(tx)
        account_id = tx.execute(sqlalchemy.select(USAGE.c.account_id).limit(1)).scalar_one()
        for hours in (1, 2):
            later = NOW + timedelta(hours=hours)
            assert closing.close(tx, account_id, end=later, now=later) is not None
        assert found(tx) == []
    with altered(database) as tx:
        # when a charge of the first one is said to be the second one's
        tx.execute(
            sqlalchemy.update(ENTRY).where(ENTRY.c.invoice_id == 1, ENTRY.c.kind == "charge").values(invoice_id=2)
        )
        # then both do not add up
        wrong = found(tx)
        assert {each for each, _ in wrong} == {Wrong.INVOICE}
        assert {where.rpartition(":")[0] for _, where in wrong} == {"invoice:1", "invoice:2"}
