"""Invoices over HTTP: an account sees its own, as they were issued."""

from __future__ import annotations

import csv
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from billing import closing, invoices
from storage import runs
from storage.open import Storage
from tests.api.conftest import Account
from tests.factories import bill, make_operation, make_usage


def issue(storage: Storage, account: Account, *seqs: int) -> Any:
    """An invoice of an account for operations of a new run; the row."""
    run_id = account.run()
    with storage.database.begin() as tx:
        run = runs.get_run(tx, run_id)
        for seq in seqs:
            bill(
                tx, run, make_operation(tx, run, seq), make_usage(device_ns=seq * 10**12), now=storage.database.now(tx)
            )
    with storage.database.begin() as tx:
        now = storage.database.now(tx)
        return closing.close(tx, account.id, end=now, now=now)


def test_invoices_are_listed_newest_first(alice: Account, storage: Storage) -> None:
    numbers = [issue(storage, alice, seq).number for seq in (1, 2, 3)]
    assert [each["number"] for each in alice.get("invoices").json()["invoices"]] == numbers[::-1]
    page = alice.get("invoices", params={"limit": 1, "offset": 1}).json()["invoices"]
    assert [each["number"] for each in page] == [numbers[1]]


def test_an_invoice_is_read_as_it_was_issued(alice: Account, storage: Storage) -> None:
    invoice = issue(storage, alice, 1, 2)
    answer = alice.get(f"invoices/{invoice.number}")
    assert invoices.digest(answer.text) == invoice.sha256
    assert Decimal(answer.json()["total"]) == invoice.total > 0


def test_an_invoice_is_a_table_where_that_is_asked_for(alice: Account, storage: Storage) -> None:
    number = issue(storage, alice, 1, 2).number
    first = alice.get(f"invoices/{number}", params={"format": "csv"})
    headers = {"X-API-Key": alice.secret, "Accept": "text/csv"}
    second = alice.http.get(f"/api/v1/invoices/{number}", headers=headers)
    assert first.headers["content-type"].startswith("text/csv")
    assert first.text == second.text
    rows = list(csv.DictReader(first.text.splitlines()))
    *lines, total = [Decimal(row["amount"]) for row in rows]
    assert sum(lines) == total > 0


def test_another_accounts_invoice_is_not_there(make_account: Callable[[str], Account], storage: Storage) -> None:
    one, two = make_account("one"), make_account("two")
    number = issue(storage, one, 1).number
    assert two.get("invoices").json() == {"invoices": []}
    assert two.get(f"invoices/{number}").status_code == 404


def test_an_invoice_is_a_pdf_where_that_is_asked_for(alice: Account, storage: Storage) -> None:
    number = issue(storage, alice, 1).number
    answer = alice.get(f"invoices/{number}", params={"format": "pdf"})
    assert answer.headers["content-type"] == "application/pdf"
    assert answer.content.startswith(b"%PDF-")
