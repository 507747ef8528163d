"""`piecework accounts`: who owns runs and pays for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from api.cli.errors import CliError
from api.cli.opened import opened
from api.cli.options import data_dir_option, json_option
from api.cli.output import moment, print_json, print_table
from storage import accounts as stored

NAME_MAX = 128


@click.group()
def accounts() -> None:
    """Accounts own runs and pay for them; see also `piecework keys`."""


@accounts.command()
@click.argument("name")
@json_option
@data_dir_option
def create(name: str, as_json: bool, data_dir: Path) -> None:
    """Add an account called NAME."""
    name = name.strip()
    if not 0 < len(name) <= NAME_MAX:
        raise CliError(f"an account's name has 1 to {NAME_MAX} characters, not {len(name)}")
    with opened(data_dir, create=True) as storage, storage.database.begin() as tx:
        try:
            account = stored.create_account(tx, name, now=storage.database.now(tx))
        except stored.AccountExistsError as error:
            raise CliError(f"{error}: choose another name, or `piecework keys create --account {name}`") from error
    if as_json:
        print_json({"id": account.id, "name": account.name})
    else:
        click.echo(f"account {account.name} is made; its first key: piecework keys create --account {account.name}")


@accounts.command("list")
@json_option
@data_dir_option
def list_(as_json: bool, data_dir: Path) -> None:
    """Show all accounts."""
    with opened(data_dir, create=True) as storage, storage.database.read() as tx:
        rows: list[dict[str, Any]] = [
            {
                "id": account.id,
                "name": account.name,
                "created_at": account.created_at.isoformat(),
                "keys": sum(key.revoked_at is None for key in stored.list_keys(tx, account.id)),
            }
            for account in stored.list_accounts(tx)
        ]
    if as_json:
        print_json({"accounts": rows})
        return
    table = [(row["name"], row["id"], row["keys"], moment(row["created_at"])) for row in rows]
    print_table(
        ("name", "id", "valid keys", "created"),
        table,
        numbers=[2],
        empty="no account yet: piecework accounts create NAME",
    )
