"""Invoices, corrections and rate cards on the command line, without a running service."""

from __future__ import annotations

import csv
import json
from decimal import Decimal
from pathlib import Path

from sqlalchemy import update

from api.cli.opened import opened
from billing import money, rate_cards, storage_metering
from billing.charging import BOOKED_LATE
from billing.dimensions import Dimensions
from billing.ledger import EntryKind, NewEntry, append, get
from billing.usage_totals import HOUR, hour_of
from storage import billing_tables, checkpoints
from storage.migrate import migrate
from storage.open import open_storage
from storage.settings import StorageSettings
from tests.cli.test_admin import run, run_json
from tests.factories import bill, make_account, make_checkpoint, make_operation, make_run, make_usage


def use(data_dir: Path) -> None:
    """An account that has been charged for 30 000 s of the default card, and has paid 1."""
    storage = open_storage(StorageSettings(data_dir=data_dir))
    migrate(storage.database)
    with storage.database.begin() as tx:
        account = make_account(tx, "ada")
        now = storage.database.now(tx)
        ours = make_run(tx, account)
        operation = make_operation(tx, ours)
        bill(tx, ours, operation, make_usage(device_ns=30_000 * 10**9, tokens_trained=10**6), now=now)
        append(tx, [NewEntry(EntryKind.TOP_UP, "topup:1", Dimensions(account.id), -money.SCALE)], now=now)
    storage.close()


def keep(data_dir: Path) -> None:
    """An account that has kept 2 GB for two hours, at 0.36 a month, three hours ago."""
    storage = open_storage(StorageSettings(data_dir=data_dir))
    migrate(storage.database)
    since = hour_of(storage.database.clock.now()) - 3 * HOUR
    with storage.database.begin() as tx:
        rate_cards.add(tx, '[gigabyte_months]\ncheckpoint = "0.36"', now=since - HOUR)
        ours = make_run(tx, make_account(tx, "ada"), now=since)
        path = make_checkpoint(tx, ours, now=since).path
        tx.execute(update(billing_tables.storage_span).values(size_bytes=2 * 10**9))
        checkpoints.remove(tx, ours.account_id, path, now=since + 2 * HOUR)
    while not storage_metering.meter(storage.database, pass_s=60):
        pass
    storage.close()


def test_storage_is_on_the_bill_wherever_one_looks(tmp_path: Path) -> None:
    # Given
    keep(tmp_path)
    # When
    table = run(tmp_path, "cost", "--account", "ada").stdout
    report = run_json(tmp_path, "cost")
    checked = run_json(tmp_path, "billing", "verify")
    run_json(tmp_path, "invoices", "close", "--account", "ada")
    (line,) = run_json(tmp_path, "invoices", "show", "1")["lines"]
    traced = run_json(tmp_path, "invoices", "show", "1", "--trace", "1")["entries"]
    shown = run(tmp_path, "invoices", "show", "1", "--trace", "1").stdout
    pdf = run(tmp_path, "invoices", "show", "1", "--pdf", str(tmp_path / "1.pdf"))
    # Then: 4 GB-hours of the 720 of a GB-month
    assert "checkpoint_storage" in table
    assert "GB-hours" in table
    assert "4.000" in table
    (row,) = report["rows"]
    assert (row["byte_seconds"], row["cost"]) == (4 * 3600 * 10**9, "0.002")
    assert checked["differences"] == []
    assert (line["storage"], line["quantities"], line["amount"]) == (
        "checkpoint",
        {"byte_seconds": str(4 * 3600 * 10**9)},
        "0.002",
    )
    assert [(entry["storage_byte_seconds"], entry["amount"]) for entry in traced] == [(2 * 3600 * 10**9, "0.001")] * 2
    assert "byte-seconds" in shown
    assert "device ns" not in shown
    assert pdf.exit_code == 0, pdf.output


def test_an_invoice_is_closed_shown_and_credited(tmp_path: Path) -> None:
    # Given
    use(tmp_path)
    # When
    closed = run_json(tmp_path, "invoices", "close", "--account", "ada")["invoice"]
    again = run_json(tmp_path, "invoices", "close", "--account", "ada")["invoice"]
    # Then
    assert (closed["number"], again) == (1, None)
    shown = run_json(tmp_path, "invoices", "show", "1")
    assert shown["total"] == closed["total"]
    charged = Decimal(shown["lines"][0]["amount"])
    assert charged > 0
    rows = list(csv.reader(run(tmp_path, "invoices", "show", "1", "--csv").stdout.splitlines()))
    assert {len(row) for row in rows} == {len(rows[0])}
    amounts = [Decimal(row[-2]) for row in rows[1:]]
    assert sum(amounts[:-1]) == amounts[-1] == Decimal(closed["total"])
    # And: a line leads to its usage record
    (entry,) = run_json(tmp_path, "invoices", "show", "1", "--trace", "1")["entries"]
    assert (entry["usage_device_ns"], Decimal(entry["amount"])) == (30_000 * 10**9, charged)
    # When
    asked_for = ("invoices", "credit", "1", "--reason", "outage", "--reference", "t7")
    note, new = run_json(tmp_path, *asked_for).values()
    # Then
    assert new
    assert run_json(tmp_path, *asked_for) == {"invoice": note, "new": False}
    assert "credit note 2 was made already: -" in run(tmp_path, *asked_for).output
    assert "--reference: it is empty" in run(tmp_path, *asked_for[:-1], "").output.replace("'", "")
    assert (note["number"], note["kind"]) == (2, "credit_note")
    assert [each["number"] for each in run_json(tmp_path, "invoices", "list")["invoices"]] == [2, 1]
    refused = run(tmp_path, "invoices", "credit", "1", "--reason", "again")
    assert refused.exit_code == 1
    assert "is left to be credited" in refused.output
    assert "nothing of invoice 1 is left to be credited" in refused.output
    assert run(tmp_path, "invoices", "show", "1", "--trace", "9").output == (
        "Error: there is no line of invoice 1 with the number 9\n"
    )
    assert "ada" in run(tmp_path, "invoices", "list").output
    assert "Payment" in run(tmp_path, "invoices", "show", "1").output
    assert run(tmp_path, "invoices", "show", "1", "--pdf", str(tmp_path / "1.pdf")).exit_code == 0
    assert (tmp_path / "1.pdf").read_bytes().startswith(b"%PDF-")


def test_a_period_that_no_total_can_hold_is_closed_in_parts(tmp_path: Path) -> None:
    # Given
    run_json(tmp_path, "accounts", "create", "ada")
    for _ in range(2):
        run_json(tmp_path, "billing", "topup", "9000000", "--account", "ada")
    # When
    told = [run(tmp_path, "invoices", "close", "--account", "ada").output.splitlines() for _ in range(2)]
    # Then
    assert told[0][0] == "invoice 1: -9000000.00 USD"
    assert "close again for the rest" in told[0][1]
    assert told[1] == ["invoice 2: -9000000.00 USD"]


def test_a_ledger_entry_is_adjusted_once(tmp_path: Path) -> None:
    # Given
    use(tmp_path)
    arguments = ("billing", "adjust", "1", "--amount", "-0.0001", "--reason", "slow", "--reference", "a")
    # When
    news = [run_json(tmp_path, *arguments)["new"] for _ in range(2)]
    # Then
    assert news == [True, False]
    assert run(tmp_path, *arguments).output == "was booked already: entry 3, -0.0001 USD on entry 1\n"
    # And: both entries are listed, newest first, and how many are wanted
    listed = run_json(tmp_path, "billing", "entries", "--account", "ada")["entries"]
    assert [(one["id"], one["kind"], one["corrects"], one["note"]) for one in listed] == [
        (3, "adjustment", 1, "slow"),
        (2, "topup", None, None),
        (1, "charge", None, None),
    ]
    assert listed[0]["amount"] == "-0.0001"
    assert [listed[2]["run"], listed[2]["invoice"]] == [listed[0]["run"], None]
    for arguments, found in (
        (["--kind", "charge"], [1]),
        (["--kind", "charge", "--kind", "adjustment"], [3, 1]),
        (["--project", "another"], []),
        (["--run", listed[0]["run"]], [3, 1]),
        (["--limit", "1", "--before", "3"], [2]),
        (["--since", "2020-01-01"], [3, 2, 1]),
    ):
        chosen = run_json(tmp_path, "billing", "entries", "--account", "ada", *arguments)["entries"]
        assert [one["id"] for one in chosen] == found, arguments
    shown = run(tmp_path, "billing", "entries", "--account", "ada", "--limit", "1").output.splitlines()
    assert shown[0].split() == ["entry", "booked", "kind", "what", "for", "project", "invoice", "USD"]
    assert (shown[1].split()[0], shown[1].split()[-1], shown[2]) == ("3", "-0.0001", "more: --before 3")
    assert "would outweigh" in run(tmp_path, "billing", "adjust", "1", "--amount=-9", "--reason", "x").output


def test_a_balance_is_told_as_it_was(tmp_path: Path) -> None:
    use(tmp_path)
    balance = ("billing", "balance", "--account", "ada")
    assert run_json(tmp_path, *balance, "--at", "2020-01-01")["balance"] == "0"
    assert run_json(tmp_path, *balance)["balance"] != "0"


def test_rate_cards_are_added_listed_and_shown(tmp_path: Path) -> None:
    # Given
    use(tmp_path)
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text('[device_seconds]\n"*" = "2"\n')
    bad.write_text('[device_seconds]\n"*" = "cheap"\n')
    # When
    card = run_json(tmp_path, "billing", "cards", "add", str(good), "--account", "ada")["id"]
    # Then
    assert run(tmp_path, "billing", "cards", "show", str(card)).output == good.read_text()
    assert [each["id"] for each in run_json(tmp_path, "billing", "cards", "list")["cards"]] == [card, 1]
    refused = run(tmp_path, "billing", "cards", "add", str(bad))
    assert refused.exit_code == 1
    assert "line 2" in refused.output
    assert json.loads(run(tmp_path, "billing", "cards", "list", "--json").output)["cards"][0]["account"]


def test_the_card_that_holds_now_is_shown(tmp_path: Path) -> None:
    # given a general card, one for an account, and one that does not hold yet
    own = '[device_seconds]\n"*" = "2"\n'
    with opened(tmp_path, create=True) as storage, storage.database.begin() as tx:
        ada, _bob = make_account(tx, "ada"), make_account(tx, "bob")
        now = storage.database.now(tx)
        rate_cards.add(tx, own, now=now - HOUR, account_id=ada.id)
        rate_cards.add(tx, own.replace("2", "3"), now=now, effective_at=now + HOUR)
    shipped = rate_cards.read_card()
    # when, then
    for options, shown in (([], shipped), (["--account", "bob"], shipped), (["--account", "ada"], own)):
        assert run(tmp_path, "billing", "cards", "show", *options).output == shown
    refused = run(tmp_path, "billing", "cards", "show", "1", "--account", "ada")
    assert (refused.exit_code, refused.output) == (1, "Error: name a card or --account, not both\n")


def test_an_entry_of_a_charge_that_was_booked_late_says_for_what_and_that(tmp_path: Path) -> None:
    # Given
    use(tmp_path)
    storage = open_storage(StorageSettings(data_dir=tmp_path))
    with storage.database.begin() as tx:
        whom = get(tx, "topup:1").dimensions
        late = NewEntry(EntryKind.CHARGE, "operation:9", whom, 1, note=BOOKED_LATE)
        append(tx, [late], now=storage.database.now(tx))
    storage.close()
    # When, then
    assert f"operation:9, {BOOKED_LATE}" in run(tmp_path, "billing", "entries", "--account", "ada").stdout
