"""`piecework keys`: credentials of accounts, shown once and stored as a hash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from api.cli.errors import CliError
from api.cli.named import get_account
from api.cli.opened import opened
from api.cli.options import NUMBER, NumbersGroup, data_dir_option, json_option
from api.cli.output import moment, print_json, print_table
from storage import accounts as stored
from storage.errors import RowNotFoundError


@click.group(cls=NumbersGroup)
def keys() -> None:
    """API keys of accounts; the tinker SDK takes one as TINKER_API_KEY."""


@keys.command()
@click.option("--account", "account_name", required=True, help="Account that pays for what is done with the key.")
@click.option("--name", default="", help="What it is for, as `keys list` shows it.")
@json_option
@data_dir_option
def create(account_name: str, name: str, as_json: bool, data_dir: Path) -> None:
    """Make a key and print it: the only time that it can be seen."""
    with opened(data_dir) as storage, storage.database.begin() as tx:
        account = get_account(tx, account_name)
        secret = stored.create_key(tx, account.id, name=name, now=storage.database.now(tx))
    if as_json:
        print_json({"api_key": secret})
    else:
        click.echo(secret)
        click.echo("Shown now and never again. For the SDK: export TINKER_API_KEY=…", err=True)


@keys.command("list")
@click.option("--account", "account_name", help="Only keys of this account.")
@json_option
@data_dir_option
def list_(account_name: str | None, as_json: bool, data_dir: Path) -> None:
    """Show keys without their secrets."""
    with opened(data_dir) as storage, storage.database.read() as tx:
        owners = [get_account(tx, account_name)] if account_name else stored.list_accounts(tx)
        rows: list[dict[str, Any]] = [
            {
                "id": key.id,
                "account": account.name,
                "name": key.name,
                "hint": f"…{key.hint}",
                "created_at": key.created_at.isoformat(),
                "revoked_at": key.revoked_at and key.revoked_at.isoformat(),
            }
            for account in owners
            for key in stored.list_keys(tx, account.id)
        ]
    if as_json:
        print_json({"keys": rows})
        return
    table = [
        (row["id"], row["account"], row["hint"], row["name"], moment(row["created_at"]), moment(row["revoked_at"]))
        for row in rows
    ]
    headings = ("id", "account", "key", "name", "created", "revoked")
    print_table(headings, table, numbers=[0], folds=[3], empty="no key yet: piecework keys create --account NAME")


@keys.command()
@click.argument("key_id", type=NUMBER)
@json_option
@data_dir_option
def revoke(key_id: int, as_json: bool, data_dir: Path) -> None:
    """End the key with number KEY_ID (see `keys list`); requests with it are refused from then on."""
    with opened(data_dir) as storage, storage.database.begin() as tx:
        try:
            stored.revoke_key(tx, key_id, now=storage.database.now(tx))
        except RowNotFoundError as error:
            raise CliError(f"there is no key {key_id}: see `piecework keys list`") from error
    if as_json:
        print_json({"revoked": key_id})
    else:
        click.echo(f"key {key_id} is revoked")
