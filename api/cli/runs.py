"""`piecework runs` and `piecework ops`: the training runs, and the operations of one."""

from __future__ import annotations

from pathlib import Path

import click

from api.cli.opened import opened
from api.cli.options import data_dir_option, json_option
from api.cli.output import print_json, print_table
from storage import accounts, journal
from storage import runs as stored


@click.command()
@click.option("--account", "account_name", help="Only runs of this account.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="Newest runs per account.")
@json_option
@data_dir_option
def runs(account_name: str | None, limit: int, as_json: bool, data_dir: Path) -> None:
    """Show training runs, newest first."""
    with opened(data_dir) as storage, storage.database.read() as tx:
        owners = [accounts.get_account(tx, account_name)] if account_name else accounts.list_accounts(tx)
        rows = [
            {
                "run": run.id,
                "account": account.name,
                "base_model": run.base_model,
                "state_seq": run.state_seq,
                "created_at": run.created_at.isoformat(),
                "worker": run.lease_worker,
            }
            for account in owners
            for run in stored.list_runs(tx, account.id, limit=limit)
        ]
    if as_json:
        print_json({"runs": rows})
        return
    table = [[row[name] if row[name] is not None else "" for name in row] for row in rows]
    headings = ("run", "account", "base model", "at seq", "created", "worker")
    print_table(headings, table, numbers=[3], empty="no run yet")


@click.command()
@click.argument("run")
@click.option("--after", "after_seq", type=int, default=-1, help="Only operations after this seq.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=1000, show_default=True, help="At most so many.")
@json_option
@data_dir_option
def ops(run: str, after_seq: int, limit: int, as_json: bool, data_dir: Path) -> None:
    """Show the operations of training run RUN in order, with their outcome."""
    with opened(data_dir) as storage, storage.database.read() as tx:
        stored.get_run(tx, run)
        rows = [
            {
                "seq": one.seq,
                "kind": one.kind,
                "status": one.status,
                "attempts": one.attempts,
                "accepted_at": one.accepted_at.isoformat(),
                "finished_at": one.finished_at and one.finished_at.isoformat(),
                "error": one.error,
            }
            for one in journal.list_operations(tx, run, limit=limit, after_seq=after_seq)
        ]
    if as_json:
        print_json({"operations": rows})
        return
    table = [[row[name] if row[name] is not None else "" for name in row] for row in rows]
    headings = ("seq", "kind", "status", "attempts", "accepted", "finished", "error")
    print_table(headings, table, numbers=[0, 3], empty="no operation yet")
