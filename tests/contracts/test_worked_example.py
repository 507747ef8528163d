"""The worked example of docs/billing.md, charged and put on an invoice as it says."""

import re
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

from billing import closing, invoices, ledger, rate_card_file, rate_cards, rating
from billing.dimensions import Dimensions
from billing.ledger import EntryKind, NewEntry
from billing.metering import split_ns
from billing.money import from_units, to_units
from storage import billing_tables
from storage.database import Database
from tests.factories import NOW, bill, make_operation, make_run, make_usage

PAGE = (Path(__file__).parents[2] / "docs" / "billing.md").read_text(encoding="utf-8")
EXAMPLE = PAGE.split("## A worked example")[1].split("\n## ")[0]
CARD = EXAMPLE.split("```toml\n")[1].split("```")[0]
ROWS = re.findall(r"^\| `(\w+)` \| (.+) \|$", EXAMPLE, re.MULTILINE)


def test_the_worked_example_is_charged_and_invoiced_as_the_page_says(database: Database) -> None:
    # Given
    rows = [(kind, [Decimal(cell) for cell in cells.split(" | ")]) for kind, cells in ROWS]
    assert len(rows) == 4
    with database.begin() as tx:
        rate_cards.add(tx, CARD, now=NOW - timedelta(hours=1))
        run = make_run(tx)
        # When
        for seq, (kind, (seconds, trained, prefilled, cached, sampled, _)) in enumerate(rows):
            tokens = {"tokens_trained": trained, "tokens_prefilled": prefilled, "tokens_cached": cached}
            used = make_usage(
                device="cuda:NVIDIA H100",
                device_ns=int(seconds * 10**9),
                **{name: int(count) for name, count in tokens.items()},
                tokens_sampled=int(sampled),
            )
            bill(tx, run, make_operation(tx, run, seq, kind), used, now=NOW)
        size, kept_s = (int(number) for number in re.findall(r"(\d+) bytes\s+that is kept for (\d+) s", EXAMPLE)[0])
        stored = rating.storage_charge("checkpoint", size * kept_s, rate_card_file.parse(CARD, "card"))
        entry = NewEntry(EntryKind.CHARGE, "storage:1", Dimensions(run.account_id), to_units(stored))
        ledger.append(tx, [entry], now=NOW)
        charges = tx.execute(billing_tables.ledger_entry.select().order_by(billing_tables.ledger_entry.c.id)).all()
        together = -ledger.balance(tx, run.account_id)
        end = NOW + timedelta(hours=1)
        invoice = closing.close(tx, run.account_id, end=end, now=end)
        assert invoice is not None
        rounding = -ledger.balance(tx, run.account_id) - together
        assert list(invoices.check(tx)) == []
    # Then
    assert [from_units(row.amount) for row in charges] == [*(cells[-1] for _, cells in rows), stored]
    told = [stored, together, invoice.total, rounding]
    assert told == [Decimal("0.003"), Decimal("3.638242000001"), Decimal("3.64"), Decimal("0.001757999999")]
    assert all(str(amount.normalize()) in EXAMPLE for amount in told)


def test_the_step_of_the_worked_example_is_split_as_the_page_says() -> None:
    step_ns = int(Decimal(re.findall(r"One step of (\S+) s", EXAMPLE)[0]) * 10**9)
    rows = [[Decimal(cell) for cell in cells.split(" | ")] for kind, cells in ROWS if kind == "forward_backward"]
    assert split_ns(step_ns, [int(row[1]) for row in rows]) == [int(row[0] * 10**9) for row in rows]
