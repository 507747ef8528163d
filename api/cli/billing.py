"""`piecework billing`: money that comes in, where an account stands, and whether the bill is right."""

from __future__ import annotations

import secrets
from pathlib import Path

import click

from api.cli.billing_adjust import adjust
from api.cli.billing_cards import cards
from api.cli.billing_entries import entries
from api.cli.billing_export import export, rebuild_rollups
from api.cli.billing_reconcile import reconcile
from api.cli.billing_verify import verify
from api.cli.errors import CliError
from api.cli.named import get_account
from api.cli.opened import opened
from api.cli.options import (
    NumbersGroup,
    account_option,
    data_dir_option,
    json_option,
    project_option,
    reference_option,
)
from api.cli.output import print_json
from api.cli.values import parse_amount, parse_moment
from billing import ledger, money, rate_cards
from billing.dimensions import Dimensions
from billing.ledger import EntryKind, NewEntry
from storage.patience import unhurried


@click.group(cls=NumbersGroup)
def billing() -> None:
    """Top-ups, credits, balances, and a check of every charge; see also `piecework budgets` and `piecework cost`."""


@billing.command()
@click.argument("amount")
@account_option
@project_option("Counts for this project's caps too.")
@reference_option("Of the payment: the same one again is booked once.")
@json_option
@data_dir_option
def topup(
    *, amount: str, account_name: str, project_id: str | None, reference: str | None, as_json: bool, data_dir: Path
) -> None:
    """Book AMOUNT that an account has paid; what a spent cap had paused goes on by itself."""
    _book(
        EntryKind.TOP_UP,
        amount=amount,
        account_name=account_name,
        project_id=project_id,
        reference=reference,
        as_json=as_json,
        data_dir=data_dir,
    )


@billing.command()
@click.argument("amount")
@account_option
@project_option("Counts for this project's caps too.")
@reference_option("What it is for: the same one again is booked once.")
@json_option
@data_dir_option
def credit(
    *, amount: str, account_name: str, project_id: str | None, reference: str | None, as_json: bool, data_dir: Path
) -> None:
    """Give an account AMOUNT."""
    _book(
        EntryKind.CREDIT,
        amount=amount,
        account_name=account_name,
        project_id=project_id,
        reference=reference,
        as_json=as_json,
        data_dir=data_dir,
    )


@billing.command()
@account_option
@project_option("Only this project of it.")
@click.option("--at", "moment", help="As it was then: a day or a moment, UTC.")
@json_option
@data_dir_option
def balance(*, account_name: str, project_id: str | None, moment: str | None, as_json: bool, data_dir: Path) -> None:
    """Show what an account has in its favour; negative is owed."""
    with opened(data_dir) as storage, storage.database.read() as tx, unhurried(tx):
        account = get_account(tx, account_name)
        at = parse_moment(moment, "--at", now=storage.database.now(tx)) if moment else None
        amount = money.plain(ledger.balance(tx, account.id, project_id=project_id, at=at))
        currency = rate_cards.currency(tx)
    if as_json:
        print_json({"account": account.name, "balance": amount, "currency": currency})
    else:
        click.echo(f"{account.name}: {amount} {currency}")


def _book(
    kind: EntryKind,
    *,
    amount: str,
    account_name: str,
    project_id: str | None,
    reference: str | None,
    as_json: bool,
    data_dir: Path,
) -> None:
    units = parse_amount(amount)
    with opened(data_dir) as storage:
        with storage.database.begin() as tx:
            account = get_account(tx, account_name)
            source = f"{kind}:{account.id}:{reference or secrets.token_hex(8)}"
            whom = Dimensions(account.id, project_id)
            entry = NewEntry(kind, source, whom, -units, note=reference)
            new = ledger.append_once(tx, entry, now=storage.database.now(tx))
            booked = ledger.find(tx, source)
            currency = rate_cards.currency(tx)
        with storage.database.read() as tx:  # adding up keeps nobody else waiting
            now_there = money.plain(ledger.balance(tx, account.id))
    if not new and booked is not None and (booked.units, booked.dimensions.project_id) != (-units, project_id):
        raise CliError(
            f"reference {reference!r} is that of another booking, of {money.plain(-booked.amount)}: choose another one"
        )
    if as_json:
        print_json({"account": account.name, "new": new, "balance": now_there, "currency": currency})
    else:
        click.echo(f"{'booked' if new else 'was booked already'}; {account.name} has {now_there} {currency}")


billing.add_command(adjust)
billing.add_command(cards)
billing.add_command(entries)
billing.add_command(export)
billing.add_command(rebuild_rollups)
billing.add_command(reconcile)
billing.add_command(verify)
