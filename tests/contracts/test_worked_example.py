"""The worked example of docs/billing.md, charged and put on an invoice as it says."""

import re
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

from billing import closing, invoices, ledger, rate_cards
from billing.metering import split_ns
from billing.money import from_units, plain
from storage import billing_tables
from storage.database import Database
from tests.contracts.storage_kit import keep, meter, set_clock
from tests.factories import NOW, bill, make_operation, make_run, make_usage

PAGE = (Path(__file__).parents[2] / "docs" / "billing.md").read_text(encoding="utf-8")
EXAMPLE = PAGE.split("## A worked example")[1].split("\n## ")[0]
CARD = EXAMPLE.split("```toml\n")[1].split("```")[0]
ROWS = re.findall(r"^\| `(\w+)` \| (.+) \|$", EXAMPLE, re.MULTILINE)
TOLD = ("3.638241999989", "3.64", "0.001758000011")


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
        keep(tx, run, size, since=NOW, until=NOW + timedelta(seconds=kept_s))
    meter(database, set_clock(database), at=NOW + timedelta(seconds=kept_s, hours=1))
    with database.begin() as tx:
        charges = tx.execute(billing_tables.ledger_entry.select().order_by(billing_tables.ledger_entry.c.id)).all()
        together = -ledger.balance(tx, run.account_id)
        end = NOW + timedelta(days=2)
        invoice = closing.close(tx, run.account_id, end=end, now=end)
        assert invoice is not None
        rounding = -ledger.balance(tx, run.account_id) - together
        assert list(invoices.check(tx)) == []
    # Then
    amounts = [from_units(row.amount) for row in charges]
    assert amounts[:4] == [cells[-1] for _, cells in rows]
    (hourly,) = set(amounts[4:])
    assert len(amounts[4:]) == 36
    told = [hourly, sum(amounts[4:]), together, invoice.total, rounding]
    assert told == [Decimal(text) for text in ("0.000083333333", "0.002999999988", *TOLD)]
    assert all(plain(Decimal(amount)) in EXAMPLE for amount in told)


def test_the_step_of_the_worked_example_is_split_as_the_page_says() -> None:
    step_ns = int(Decimal(re.findall(r"One step of (\S+) s", EXAMPLE)[0]) * 10**9)
    rows = [[Decimal(cell) for cell in cells.split(" | ")] for kind, cells in ROWS if kind == "forward_backward"]
    assert split_ns(step_ns, [int(row[1]) for row in rows]) == [int(row[0] * 10**9) for row in rows]
