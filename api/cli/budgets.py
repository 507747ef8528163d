"""`piecework budgets`: caps on what accounts, projects, keys, sessions, runs and batches may cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import click
from sqlalchemy import Connection

from api.cli.errors import CliError
from api.cli.named import get_account
from api.cli.opened import opened
from api.cli.options import NUMBER, NumbersGroup, WholeNumber, account_option, data_dir_option, json_option
from api.cli.output import print_json, print_table
from api.cli.values import parse_amount
from billing import budgets as stored
from billing.budgets import Budget, Period, Scope
from storage import accounts, runs
from storage.errors import RowNotFoundError


@click.group(cls=NumbersGroup)
def budgets() -> None:
    """Caps. What a spent hard cap covers waits, and goes on by itself when there is room."""


@budgets.command()
@click.argument("cap")
@account_option
@click.option(
    "--scope", type=click.Choice([*map(str, Scope)]), default="account", show_default=True, help="What it caps."
)
@click.option("--id", "scope_id", help="Which project, key (its number), session, run or batch (its name).")
@click.option("--period", type=click.Choice([*map(str, Period)]), default="none", show_default=True, help="UTC.")
@click.option("--soft", is_flag=True, help="Only tell, never pause.")
@click.option(
    "--tell-at",
    "thresholds",
    type=WholeNumber(1, 1000),
    multiple=True,
    default=stored.THRESHOLDS,
    show_default=True,
    help="Per cent of the cap at which log and webhooks are told; may be given several times.",
)
@json_option
@data_dir_option
def add(
    *,
    cap: str,
    account_name: str,
    scope: str,
    scope_id: str | None,
    period: str,
    soft: bool,
    thresholds: Sequence[int],
    as_json: bool,
    data_dir: Path,
) -> None:
    """Add a cap of CAP, in the currency of the rate card."""
    units = parse_amount(cap, "CAP")
    with opened(data_dir) as storage, storage.database.begin() as tx:
        account = get_account(tx, account_name)
        chosen = _checked(tx, account.id, Scope(scope), scope_id)
        now = storage.database.now(tx)
        budget = stored.add(
            tx,
            account.id,
            Scope(scope),
            chosen,
            cap=units,
            now=now,
            period=Period(period),
            is_hard=not soft,
            thresholds=sorted(set(thresholds)),
        )
    _show([budget], {account.id: account.name}, as_json=as_json)


@budgets.command("list")
@click.option("--account", "account_name", help="Only caps of this account.")
@json_option
@data_dir_option
def list_(account_name: str | None, as_json: bool, data_dir: Path) -> None:
    """Show caps, what of them is spent and held, and where they stand.

    \b
    open      there is room
    refusing  in the last minute there was not enough for something that was asked for: its client waits, and asks again
    over      spent, but soft: nothing waits
    paused    spent: what it covers waits until it is topped up, raised, removed, or its next period begins
    """
    with opened(data_dir) as storage, storage.database.read() as tx:
        owners = [get_account(tx, account_name)] if account_name else accounts.list_accounts(tx)
        names = {account.id: account.name for account in owners}
        found = stored.list_budgets(tx, list(names), now=storage.database.now(tx))
    _show(found, names, as_json=as_json)


@budgets.command("set")
@click.argument("budget_id", type=NUMBER)
@click.argument("cap")
@account_option
@json_option
@data_dir_option
def set_(budget_id: int, cap: str, account_name: str, as_json: bool, data_dir: Path) -> None:
    """Change the cap of budget BUDGET_ID (see `budgets list`) to CAP."""
    units = parse_amount(cap, "CAP")
    with opened(data_dir) as storage, storage.database.begin() as tx:
        account = get_account(tx, account_name)
        try:
            budget = stored.set_cap(tx, account.id, budget_id, units, now=storage.database.now(tx))
        except RowNotFoundError as error:
            raise _unknown(budget_id, account_name) from error
    _show([budget], {account.id: account.name}, as_json=as_json)


@budgets.command()
@click.argument("budget_id", type=NUMBER)
@account_option
@json_option
@data_dir_option
def remove(budget_id: int, account_name: str, as_json: bool, data_dir: Path) -> None:
    """End budget BUDGET_ID (see `budgets list`)."""
    with opened(data_dir) as storage, storage.database.begin() as tx:
        account = get_account(tx, account_name)
        try:
            stored.remove(tx, account.id, budget_id, now=storage.database.now(tx))
        except RowNotFoundError as error:
            raise _unknown(budget_id, account_name) from error
    if as_json:
        print_json({"removed": budget_id})
    else:
        click.echo(f"budget {budget_id} is removed")


def _checked(tx: Connection, account_id: str, scope: Scope, scope_id: str | None) -> str:
    """The id of what is to be capped, which must be the account's where that can be told."""
    if scope is Scope.ACCOUNT:
        if scope_id is not None:
            others = ", ".join(each for each in Scope if each is not Scope.ACCOUNT)
            raise CliError(f"--id needs --scope, to say what {scope_id!r} is: {others}")
        return account_id
    if not scope_id:
        raise CliError(f"--scope {scope} needs --id: which {scope} is to be capped?")
    keys = {str(key.id) for key in accounts.list_keys(tx, account_id)}
    try:
        if scope is Scope.RUN:
            runs.get_run(tx, scope_id, account_id=account_id)
        if scope is Scope.SESSION:
            runs.get_session(tx, account_id, scope_id)
    except RowNotFoundError as error:
        raise CliError(f"--id {scope_id}: the account has no such {scope}") from error
    if scope is Scope.KEY and scope_id not in keys:
        raise CliError(f"--id {scope_id}: the account has no such key; see `piecework keys list`")
    return scope_id


def _unknown(budget_id: int, account_name: str) -> CliError:
    return CliError(f"there is no budget {budget_id}: see `piecework budgets list --account {account_name}`")


def _show(found: Sequence[Budget], names: Mapping[str, str], *, as_json: bool) -> None:
    rows = [{**budget.as_json(), "account": names[budget.account_id]} for budget in found]
    if as_json:
        print_json({"budgets": rows})
        return
    table = [
        (
            row["id"],
            row["account"],
            row["scope"] if row["scope"] == Scope.ACCOUNT else f"{row['scope']} {row['scope_id']}",
            "" if row["period"] == Period.NONE else row["period"],
            "hard" if row["is_hard"] else "soft",
            row["cap"],
            row["spent"],
            row["held"],
            row["state"],
        )
        for row in rows
    ]
    headings = ("id", "account", "what it caps", "per", "kind", "cap", "spent", "held", "state")
    empty = "no budget yet: piecework budgets add CAP --account NAME"
    print_table(headings, table, numbers=[0, 5, 6, 7], empty=empty)
