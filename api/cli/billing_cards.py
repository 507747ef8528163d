"""`piecework billing cards`: prices, and from when they hold."""

from __future__ import annotations

from pathlib import Path

import click

from api.cli.errors import CliError
from api.cli.named import get_account
from api.cli.opened import opened
from api.cli.options import NUMBER, data_dir_option, json_option
from api.cli.output import moment, print_json, print_table
from api.cli.values import parse_moment
from billing import rate_cards
from billing.rate_card_file import RateCardError
from billing.rate_cards import DatedCard
from storage.accounts import list_accounts
from storage.errors import RowNotFoundError
from storage.open import Storage


@click.group()
def cards() -> None:
    """Rate cards: added with a date, never changed."""


@cards.command("list")
@json_option
@data_dir_option
def list_(as_json: bool, data_dir: Path) -> None:
    """Show all rate cards, newest first."""
    with opened(data_dir) as storage, storage.database.read() as tx:
        found = rate_cards.list_cards(tx)
        names = {account.id: account.name for account in list_accounts(tx)}
    if as_json:
        rows = [(card.id, card.account_id or "", card.effective_at.isoformat(), card.card.currency) for card in found]
        print_json({"cards": [dict(zip(("id", "account", "from", "currency"), row, strict=True)) for row in rows]})
        return
    table = [
        (card.id, names.get(card.account_id or "", "(all)"), moment(card.effective_at), card.card.currency)
        for card in found
    ]
    print_table(("card", "account", "from", "currency"), table, numbers=[0], empty="no card yet")


@cards.command()
@click.argument("card_id", type=NUMBER, required=False)
@click.option("--account", "account_name", help="The card that holds now for this account.")
@data_dir_option
def show(card_id: int | None, account_name: str | None, data_dir: Path) -> None:
    """Print a rate card as it was given: CARD_ID, or the one that holds now."""
    if card_id is not None and account_name is not None:
        raise CliError("name a card or --account, not both")
    with opened(data_dir) as storage:
        card = _in_force(storage, account_name) if card_id is None else _numbered(storage, card_id)
    click.echo(card.content, nl=False)


def _numbered(storage: Storage, card_id: int) -> DatedCard:
    with storage.database.read() as tx:
        for card in rate_cards.list_cards(tx):
            if card.id == card_id:
                return card
    raise RowNotFoundError("rate card", card_id)


def _in_force(storage: Storage, account_name: str | None) -> DatedCard:
    with storage.database.begin() as tx:  # the first card may have to be written
        account_id = get_account(tx, account_name).id if account_name else None
        return rate_cards.in_force(tx, account_id, at=storage.database.now(tx))


@cards.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--account", "account_name", help="Only for this account, instead of the general prices.")
@click.option("--from", "since", help="From then on: a day or a moment, UTC; as soon as possible, if none is named.")
@json_option
@data_dir_option
def add(*, file: Path, account_name: str | None, since: str | None, as_json: bool, data_dir: Path) -> None:
    """Add the rate card in FILE (TOML); what is priced already stays as it is."""
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CliError(f"{file} is not UTF-8 ({error}): save it as UTF-8 text") from error
    with opened(data_dir, create=True) as storage, storage.database.begin() as tx:
        now = storage.database.now(tx)
        account_id = get_account(tx, account_name).id if account_name else None
        effective_at = parse_moment(since, "--from", now=now) if since else None
        try:
            card = rate_cards.add(
                tx, content, now=now, effective_at=effective_at, account_id=account_id, name=str(file)
            )
        except RateCardError as error:
            raise CliError(str(error)) from error
    if as_json:
        print_json({"id": card.id, "from": card.effective_at.isoformat()})
    else:
        click.echo(f"rate card {card.id} holds from {card.effective_at.isoformat()} on")
