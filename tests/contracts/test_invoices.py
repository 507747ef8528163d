"""Periods are closed once, add up to the last digit, and stay as they were issued."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
import sqlalchemy

from billing import closing, invoice_document, invoice_lines, invoices, money
from billing.charging import BOOKED_LATE
from billing.invoices import InvoiceError
from billing.ledger import EntryKind
from storage import billing_tables
from storage.database import Database
from storage.errors import RowNotFoundError
from storage.migrate import migrate
from tests.contracts.ledger_kit import HOUR, charge, entries, pay, price_seconds
from tests.contracts.test_database import at_once
from tests.factories import NOW, make_account, make_run

INVOICE, ENTRY = billing_tables.invoice, billing_tables.ledger_entry
END = datetime(2026, 2, 1, tzinfo=UTC)
NEXT = datetime(2026, 3, 1, tzinfo=UTC)
LONG_AFTER = NEXT + timedelta(days=100)


def test_a_period_takes_what_is_open_before_its_end_and_rounds_once(database: Database) -> None:
    with database.begin() as tx:
        # Given: three charges, the last one after the end, and a payment
        price_seconds(tx)
        run = make_run(tx)
        charge(tx, run, 0, 1_234_567_891, at=NOW)
        charge(tx, run, 1, 1_000_000_000, at=END - HOUR)
        charge(tx, run, 2, 5_000_000_000, at=END)
        pay(tx, run.account_id, "topup:1", money.SCALE, at=NOW)
        # When
        invoice = closing.close(tx, run.account_id, end=END, now=LONG_AFTER)
        # Then
        assert invoice is not None
        assert (invoice.number, invoice.period_start, invoice.period_end) == (1, NOW, END)
        document = invoices.document(tx, invoice)
        assert (document["subtotal"], document["rounding"], document["total"]) == (
            "1.234567891",
            "-0.004567891",
            "1.23",
        )
        assert [entry.amount for entry in entries(tx, ENTRY.c.invoice_id.is_(None))] == [Decimal(5)]
        (rounding,) = entries(tx, ENTRY.c.kind == EntryKind.ROUNDING)
        assert (rounding.amount, rounding.invoice_id) == (Decimal("-0.004567891"), invoice.id)
        assert list(invoices.check(tx)) == []


@pytest.mark.parametrize(
    ("nanos", "total"),
    [(5_000_000, "0"), (5_000_001, "0.01"), (15_000_000, "0.02"), (25_000_000, "0.02"), (14_999_999, "0.01")],
)
def test_half_a_cent_goes_to_the_even_cent(database: Database, nanos: int, total: str) -> None:
    with database.begin() as tx:
        price_seconds(tx)
        run = make_run(tx)
        charge(tx, run, 0, nanos, at=NOW)
        # When
        invoice = closing.close(tx, run.account_id, end=END, now=END)
        # Then
        assert invoice is not None
        assert invoice.total == Decimal(total)
        assert list(invoices.check(tx)) == []


def test_whatever_is_closed_again_is_not(database: Database) -> None:
    # Given
    with database.begin() as tx:
        price_seconds(tx)
        run = make_run(tx)
        charge(tx, run, 0, 1, at=NOW)
        assert closing.close(tx, run.account_id, end=END, now=END) is not None
    # When: usage of the period is committed late, and the period is closed once more
    with database.begin() as tx:
        late = charge(tx, run, 1, 10**9, at=END - HOUR)
        again = closing.close(tx, run.account_id, end=END, now=NEXT)
        # Then: it falls into the next one
        assert again is None
        next_one = closing.close(tx, run.account_id, end=NEXT, now=NEXT)
        assert next_one is not None
        assert (next_one.number, next_one.period_start, next_one.total) == (2, END, Decimal(1))
        assert [entry.id for entry in entries(tx, ENTRY.c.invoice_id == next_one.id)] == [late.id]
        assert list(invoices.check(tx)) == []


def test_a_period_that_has_not_ended_is_refused(database: Database) -> None:
    with database.begin() as tx, pytest.raises(InvoiceError, match="has not ended"):
        closing.close(tx, make_account(tx).id, end=END, now=END - HOUR)


def test_of_many_who_close_at_once_one_does_and_numbers_have_no_gap(database: Database) -> None:
    # Given: three accounts with one charge each
    with database.begin() as tx:
        price_seconds(tx)
        runs = [make_run(tx, make_account(tx, f"account {number}")) for number in range(3)]
        for run in runs:
            charge(tx, run, 0, 1, at=NOW)

    def close_all(place: int) -> None:
        for run in runs[place % 3 :] + runs[: place % 3]:
            with database.begin() as tx:
                closing.close(tx, run.account_id, end=END, now=LONG_AFTER)

    # When
    at_once(close_all)
    # Then
    with database.read() as tx:
        issued = invoices.list_invoices(tx)
        assert [invoice.number for invoice in issued] == [3, 2, 1]
        assert {invoice.account_id for invoice in issued} == {run.account_id for run in runs}
        assert list(invoices.check(tx)) == []


def test_a_number_that_was_not_committed_is_given_again(database: Database) -> None:
    with database.begin() as tx:
        price_seconds(tx)
        run = make_run(tx)
        charge(tx, run, 0, 1, at=NOW)
    # When
    with database.engine.connect() as tx:
        closing.close(tx, run.account_id, end=END, now=END)
        tx.rollback()
    with database.begin() as tx:
        # Then
        assert entries(tx, ENTRY.c.invoice_id.is_not(None)) == []
        invoice = closing.close(tx, run.account_id, end=END, now=END)
        assert invoice is not None
        assert invoice.number == 1


@pytest.mark.servers
def test_a_charge_that_is_committed_while_a_period_is_closed_stays_open(fresh_database_url: str) -> None:
    database = Database(fresh_database_url)
    migrate(database)
    # Given: a charge of the period in a transaction that goes on
    with database.begin() as tx:
        price_seconds(tx)
        run = make_run(tx)
        charge(tx, run, 0, 10**9, at=NOW)
    with database.begin() as closer, database.begin() as tx:
        charge(tx, run, 1, 7 * 10**9, at=NOW)
        # When
        invoice = closing.close(closer, run.account_id, end=END, now=END)
    # Then
    assert invoice is not None
    with database.read() as tx:
        assert invoices.get(tx, 1).total == Decimal(1)
        assert [entry.amount for entry in entries(tx, ENTRY.c.invoice_id.is_(None))] == [Decimal(7)]
        assert list(invoices.check(tx)) == []
    database.close()


def test_lines_are_traced_down_to_their_usage_records(database: Database) -> None:
    with database.begin() as tx:
        # Given
        price_seconds(tx)
        run = make_run(tx)
        for seq, kind in enumerate(["forward_backward", "optim_step", "forward_backward"]):
            charge(tx, run, seq, 10**9 + seq, at=NOW, kind=kind, tokens_trained=100)
        pay(tx, run.account_id, "topup:1", money.SCALE, at=NOW)
        invoice = closing.close(tx, run.account_id, end=END, now=END)
        assert invoice is not None
        # When
        lines = invoices.document(tx, invoice)["lines"]
        traced = [list(invoice_lines.trace(tx, invoice.id, line)) for line in lines]
        # Then
        assert [(line["kind"], line["operation"], line["entries"], line["amount"]) for line in lines] == [
            ("charge", "forward_backward", 2, "2.000000002"),
            ("charge", "optim_step", 1, "1.000000001"),
            ("topup", None, 1, "-1"),
        ]
        assert lines[0]["quantities"] == {"device_ns": "2000000002", "tokens_trained": "200"}
        for line, rows in zip(lines, traced, strict=True):
            assert sum(row["amount"] for row in rows) == money.to_units(Decimal(line["amount"]))
            assert sum(row["usage_device_ns"] or 0 for row in rows) == int(line["quantities"].get("device_ns", 0))
        assert sorted(row["id"] for rows in traced for row in rows) == [
            entry.id for entry in entries(tx, ENTRY.c.kind != EntryKind.ROUNDING)
        ]


@pytest.mark.parametrize(
    "change",
    [sqlalchemy.update(INVOICE).values(total=1), sqlalchemy.update(INVOICE).values(document="{}"), INVOICE.delete()],
)
def test_the_database_refuses_to_edit_an_invoice(database: Database, change: sqlalchemy.UpdateBase) -> None:
    # Given
    with database.begin() as tx:
        price_seconds(tx)
        run = make_run(tx)
        charge(tx, run, 0, 1, at=NOW)
        closing.close(tx, run.account_id, end=END, now=END)
    # Then
    with pytest.raises(sqlalchemy.exc.DBAPIError, match="append-only"), database.engine.begin() as tx:
        tx.execute(change)


def test_an_invoice_of_another_account_is_none(database: Database) -> None:
    with database.begin() as tx:
        price_seconds(tx)
        run, other = make_run(tx), make_account(tx, "other")
        charge(tx, run, 0, 1, at=NOW)
        closing.close(tx, run.account_id, end=END, now=END)
        # Then
        assert invoices.get(tx, 1, account_id=run.account_id).number == 1
        assert invoices.list_invoices(tx, account_id=other.id) == []
        with pytest.raises(RowNotFoundError):
            invoices.get(tx, 1, account_id=other.id)


def test_a_line_of_charges_that_were_booked_late_says_for_what_and_that() -> None:
    # Given
    group = dict.fromkeys(invoice_lines.GROUP) | {"kind": "charge", "note": BOOKED_LATE}
    group |= {"operation": "forward", "base_model": "m", "device": "cpu"}
    # When
    (line,) = invoice_document.lines_of([invoice_lines.Line(group, 1, {}, 5)])
    # Then
    assert line["description"] == f"forward, m on cpu: {BOOKED_LATE}"
