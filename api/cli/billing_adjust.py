"""`piecework billing adjust`: corrects one entry of the ledger by another one."""

from __future__ import annotations

import secrets
from decimal import Decimal, InvalidOperation
from pathlib import Path

import click

from api.cli.errors import CliError
from api.cli.opened import opened
from api.cli.options import NUMBER, NumbersCommand, data_dir_option, json_option, reference_option
from api.cli.output import print_json
from billing import corrections, ledger, money, rate_cards
from billing.invoices import InvoiceError
from billing.money import AmountError


@click.command(cls=NumbersCommand)
@click.argument("entry_id", type=NUMBER)
@click.option("--amount", required=True, help="What is added to the entry, e.g. -1.50 in favour of the account.")
@click.option("--reason", required=True, help="Why, as the invoice says it.")
@reference_option("The same one again is booked once.")
@json_option
@data_dir_option
def adjust(*, entry_id: int, amount: str, reason: str, reference: str | None, as_json: bool, data_dir: Path) -> None:
    """Correct ledger entry ENTRY_ID; the entry itself stays as it is."""
    with opened(data_dir) as storage, storage.database.begin() as tx:
        try:
            units = money.to_units(Decimal(amount))
            reference = reference or secrets.token_hex(8)
            now = storage.database.now(tx)
            adjustment, new = corrections.adjust(tx, entry_id, units=units, reason=reason, reference=reference, now=now)
        except InvalidOperation as error:
            raise CliError(f"--amount {amount!r} is no amount of money: write e.g. -12.50") from error
        except (InvoiceError, AmountError) as error:
            raise CliError(str(error)) from error
        booked = ledger.get(tx, adjustment.source)
        added = money.in_coins(booked.amount, rate_cards.currency(tx))
    if as_json:
        print_json({"entry": entry_id, "adjustment": booked.id, "new": new})
    else:
        told = "booked" if new else "was booked already"
        click.echo(f"{told}: entry {booked.id}, {added} on entry {entry_id}")
