"""Corrections name what they correct; a credit note is an invoice of them. Nothing that was written changes."""

from decimal import Decimal

import pytest
from sqlalchemy import Connection

from billing import closing, corrections, credit_notes, invoices, ledger, money
from billing.invoices import Invoice, InvoiceError, InvoiceKind
from billing.ledger import EntryKind
from storage import billing_tables
from storage.database import Database
from storage.errors import RowNotFoundError
from tests.contracts.ledger_kit import charge, entries, pay, price_seconds
from tests.contracts.test_invoices import END, NEXT
from tests.factories import NOW, make_run

ENTRY = billing_tables.ledger_entry
SECOND_NS = 10**9


def make_invoice(tx: Connection, *nanos: int, kinds: tuple[str, ...] = ()) -> Invoice:
    """An invoice of charges that took so long, and a payment of 1."""
    price_seconds(tx)
    run = make_run(tx)
    for seq, each in enumerate(nanos):
        charge(tx, run, seq, each, at=NOW, kind=kinds[seq] if kinds else "forward_backward")
    pay(tx, run.account_id, "topup:1", money.SCALE, at=NOW)
    invoice = closing.close(tx, run.account_id, end=END, now=END)
    assert invoice is not None
    return invoice


def test_a_credit_note_takes_back_an_invoice_entry_by_entry(database: Database) -> None:
    with database.begin() as tx:
        # Given
        invoice = make_invoice(tx, 2 * SECOND_NS + 4_000_000, SECOND_NS)
        before = invoices.text(tx, invoice)
        # When
        note, _ = credit_notes.credit(tx, invoice, reason="outage", now=NEXT)
        # Then: the payment is not taken back
        assert (note.kind, note.number, note.corrects_id) == (InvoiceKind.CREDIT_NOTE, 2, invoice.id)
        assert note.total == Decimal(-3)
        document = invoices.document(tx, note)
        assert (document["corrects"], document["reason"], document["owed_after"]) == (1, "outage", "-1")
        corrected = {entry.corrects_id: entry for entry in entries(tx, ENTRY.c.kind == EntryKind.ADJUSTMENT)}
        charges = entries(tx, ENTRY.c.kind == EntryKind.CHARGE)
        assert {entry.id: -entry.units for entry in charges} == {
            corrects: entry.units for corrects, entry in corrected.items()
        }
        assert [entry.dimensions for entry in charges] == [corrected[entry.id].dimensions for entry in charges]
        assert invoices.text(tx, invoice) == before
        assert list(invoices.check(tx)) == []


def test_no_more_is_credited_than_is_left(database: Database) -> None:
    with database.begin() as tx:
        invoice = make_invoice(tx, SECOND_NS, SECOND_NS)
        # When
        note, _ = credit_notes.credit(tx, invoice, reason="a half", units=3 * money.SCALE // 2, now=NEXT)
        # Then: the first charge is taken back wholly, the second in part
        assert [entry.amount for entry in entries(tx, ENTRY.c.invoice_id == note.id)] == [Decimal(-1), Decimal("-0.5")]
    with pytest.raises(InvoiceError, match=r"only 0\.50 USD of invoice 1 is left"), database.begin() as tx:
        credit_notes.credit(tx, invoice, reason="too much", units=money.SCALE, now=NEXT)
    with database.begin() as tx:
        # And: what is refused leaves nothing behind
        assert len(invoices.list_invoices(tx)) == 2
        assert credit_notes.credit(tx, invoice, reason="the rest", now=NEXT)[0].total == Decimal("-0.5")
        assert list(invoices.check(tx)) == []


@pytest.mark.parametrize("asked_for", [4 * money.SCALE // 1000, None])
def test_a_credit_note_of_nothing_is_not_issued(database: Database, asked_for: int | None) -> None:
    with database.begin() as tx:
        # given an invoice of two charges, or of less than half a cent
        invoice = make_invoice(tx, *((SECOND_NS, SECOND_NS) if asked_for else (2_000_000, 2_000_000)))
    # when
    with pytest.raises(InvoiceError, match=r"0\.004 USD rounds to nothing.*billing adjust"), database.begin() as tx:
        credit_notes.credit(tx, invoice, reason="x", units=asked_for, now=NEXT)
    with database.begin() as tx:
        # then nothing was used up, and a little more is a cent
        assert entries(tx, ENTRY.c.kind == EntryKind.ADJUSTMENT) == []
        assert len(invoices.list_invoices(tx)) == 1
        if asked_for:
            note, _ = credit_notes.credit(tx, invoice, reason="x", units=6 * money.SCALE // 1000, now=NEXT)
            assert (note.number, note.total) == (2, Decimal("-0.01"))
            assert credit_notes.credit(tx, invoice, reason="rest", now=NEXT)[0].total == Decimal("-1.99")
        assert list(invoices.check(tx)) == []


def test_a_credit_note_is_made_once_for_a_reference(database: Database) -> None:
    with database.begin() as tx:
        # given
        invoice = make_invoice(tx, SECOND_NS, SECOND_NS, kinds=("forward_backward", "optim_step"))
        asked_for = {"reason": "outage", "units": money.SCALE // 2, "line": 1, "reference": "ticket 7"}
        note, new = credit_notes.credit(tx, invoice, **asked_for, now=NEXT)
        # when it is asked for again
        assert (new, credit_notes.credit(tx, invoice, **asked_for, now=NEXT)) == (True, (note, False))
        # then nothing more was taken back, and what is asked for otherwise is not taken for it
        for other in ({"units": money.SCALE}, {"units": None}, {"reason": "another"}, {"line": 2}, {"line": None}):
            with pytest.raises(InvoiceError, match="that of credit note 2, which was asked for with another line"):
                credit_notes.credit(tx, invoice, **{**asked_for, **other}, now=NEXT)
        assert len(invoices.list_invoices(tx)) == 2
        # and another reference, or none, is another note
        credit_notes.credit(tx, invoice, **{**asked_for, "reference": "ticket 8"}, now=NEXT)
        credit_notes.credit(tx, invoice, reason="outage", units=money.SCALE // 2, now=NEXT)
        assert [each.total for each in invoices.list_invoices(tx)] == [*[Decimal("-0.5")] * 3, 1]
        assert list(invoices.check(tx)) == []


def test_one_line_is_credited_alone(database: Database) -> None:
    with database.begin() as tx:
        invoice = make_invoice(tx, SECOND_NS, 5 * SECOND_NS, kinds=("forward_backward", "optim_step"))
        # When
        note, _ = credit_notes.credit(tx, invoice, line=2, reason="steps", now=NEXT)
        # Then
        assert note.total == Decimal(-5)
        (line,) = invoices.document(tx, note)["lines"]
        assert (line["kind"], line["operation"], line["quantities"]) == ("adjustment", "optim_step", {})


@pytest.mark.parametrize(
    ("line", "error", "says"),
    [(2, InvoiceError, "only charges are credited"), (9, RowNotFoundError, "line of invoice 1")],
)
def test_what_is_no_charge_is_not_credited(database: Database, line: int, error: type[Exception], says: str) -> None:
    with database.begin() as tx:
        invoice = make_invoice(tx, SECOND_NS)
        with pytest.raises(error, match=says):
            credit_notes.credit(tx, invoice, line=line, reason="x", now=NEXT)


def test_a_credit_note_is_not_credited(database: Database) -> None:
    with database.begin() as tx:
        note, _ = credit_notes.credit(tx, make_invoice(tx, SECOND_NS), reason="x", now=NEXT)
        with pytest.raises(InvoiceError, match="is a credit note"):
            credit_notes.credit(tx, note, reason="y", now=NEXT)


def test_an_adjustment_names_what_it_corrects_and_is_on_the_next_invoice(database: Database) -> None:
    with database.begin() as tx:
        # Given
        invoice = make_invoice(tx, SECOND_NS)
        (charged,) = entries(tx, ENTRY.c.kind == EntryKind.CHARGE)
        # When: the same one twice
        news = [
            corrections.adjust(tx, charged.id, units=-money.SCALE // 4, reason="slow", reference="ticket", now=END)[1]
            for _ in range(2)
        ]
        # Then
        assert news == [True, False]
        (adjustment,) = entries(tx, ENTRY.c.kind == EntryKind.ADJUSTMENT)
        assert (adjustment.corrects_id, adjustment.amount, adjustment.note) == (charged.id, Decimal("-0.25"), "slow")
        assert (adjustment.dimensions, adjustment.invoice_id) == (charged.dimensions, None)
        after = closing.close(tx, invoice.account_id, end=NEXT, now=NEXT)
        assert after is not None
        assert after.total == Decimal("-0.25")
        assert invoices.document(tx, after)["lines"][0]["operation"] == "forward_backward"
        assert ledger.balance(tx, invoice.account_id) == Decimal("0.25")
        assert list(invoices.check(tx)) == []


@pytest.mark.parametrize(
    ("kind", "units", "says"),
    [
        (EntryKind.CHARGE, -money.SCALE - 1, "would outweigh it"),
        (EntryKind.TOP_UP, money.SCALE + 1, "would outweigh it"),
        (EntryKind.CHARGE, 0, "changes nothing"),
        (EntryKind.ROUNDING, 1, "not corrected itself"),
    ],
)
def test_a_correction_that_makes_no_sense_is_refused(
    database: Database, kind: EntryKind, units: int, says: str
) -> None:
    with database.begin() as tx:
        make_invoice(tx, SECOND_NS) if kind != EntryKind.ROUNDING else make_invoice(tx, SECOND_NS + 1)
        entry = entries(tx, ENTRY.c.kind == kind)[0]
        with pytest.raises(InvoiceError, match=says):
            corrections.adjust(tx, entry.id, units=units, reason="x", reference="x", now=END)


def test_corrections_of_one_entry_count_together(database: Database) -> None:
    with database.begin() as tx:
        # Given: a charge of 1, corrected by 0.75
        make_invoice(tx, SECOND_NS)
        (charged,) = entries(tx, ENTRY.c.kind == EntryKind.CHARGE)
        corrections.adjust(tx, charged.id, units=-3 * money.SCALE // 4, reason="x", reference="a", now=END)
        # Then
        with pytest.raises(InvoiceError, match=r"stands at 0\.25"):
            corrections.adjust(tx, charged.id, units=-money.SCALE // 2, reason="x", reference="b", now=END)


def test_a_correction_is_corrected_through_its_entry(database: Database) -> None:
    with database.begin() as tx:
        make_invoice(tx, SECOND_NS)
        (charged,) = entries(tx, ENTRY.c.kind == EntryKind.CHARGE)
        corrections.adjust(tx, charged.id, units=-1, reason="x", reference="a", now=END)
        (adjustment,) = entries(tx, ENTRY.c.kind == EntryKind.ADJUSTMENT)
        with pytest.raises(InvoiceError, match=f"correct entry {charged.id} instead"):
            corrections.adjust(tx, adjustment.id, units=1, reason="x", reference="b", now=END)
