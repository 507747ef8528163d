"""`piecework runs` and `piecework ops`: the training runs, and the operations of one."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import click

from api import schemas
from api.cli.named import get_account
from api.cli.opened import opened
from api.cli.options import COUNT, WholeNumber, data_dir_option, json_option
from api.cli.output import print_groups, print_json, print_table
from billing import pauses, usage
from billing.rating import device_seconds
from billing.usage import Usage
from storage import accounts, journal
from storage import runs as stored
from storage.journal import Operation
from storage.runs import Run


@click.command()
@click.option("--account", "account_name", help="Only runs of this account.")
@click.option("--after", "offset", type=COUNT, default=0, help="Leave out so many of the newest.")
@click.option("--limit", type=WholeNumber(1, 1000), default=50, show_default=True, help="At most so many, per account.")
@json_option
@data_dir_option
def runs(account_name: str | None, offset: int, limit: int, as_json: bool, data_dir: Path) -> None:
    """Show training runs, newest first."""
    with opened(data_dir) as storage, storage.database.read() as tx:
        owners = [get_account(tx, account_name)] if account_name else accounts.list_accounts(tx)
        found = [
            (account, run) for account in owners for run in stored.list_runs(tx, account.id, limit=limit, offset=offset)
        ]
        ids, now = [run.id for _, run in found], storage.database.now(tx)
        ahead = journal.num_ahead(tx, ids)
        waiting = dict.fromkeys(stored.refused_lately(tx, ids, now=now), "room under a cap")
        waiting |= {run_id: f"budget {budget.id}" for run_id, budget in pauses.waiting_runs(tx, ids, now=now).items()}
    rows: list[dict[str, Any]] = [
        {
            "run": run.id,
            "account": account.name,
            "base_model": run.base_model,
            "state_seq": run.state_seq,
            "num_open": ahead.get(run.id, 0),
            "waits_for": waiting.get(run.id),
            "created_at": run.created_at.isoformat(),
            "last_request_at": run.last_request_at.isoformat(),
            "worker": run.lease_worker,
        }
        for account, run in found
    ]
    if as_json:
        print_json({"runs": rows})
        return
    groups = [
        ((run.id, account.name), [_run_row(run, ahead.get(run.id, 0), waiting.get(run.id, ""))])
        for account, run in found
    ]
    headings = ("base model", "at", "open", "waits for", "last request")
    empty = "no run yet" if not offset else "no run after that"
    print_groups(("run", "account"), headings, groups, numbers=[1, 2], folds=[0], empty=empty)


@click.command()
@click.argument("run")
@click.option("--after", "after_seq", type=WholeNumber(-1), default=-1, help="Only operations after this seq.")
@click.option("--limit", type=WholeNumber(1, 10_000), default=1000, show_default=True, help="At most so many.")
@json_option
@data_dir_option
def ops(run: str, after_seq: int, limit: int, as_json: bool, data_dir: Path) -> None:
    """Show the operations of training run RUN in order: what became of them, and what they used."""
    with opened(data_dir) as storage, storage.database.read() as tx:
        stored.get_run(tx, run)
        page = journal.page_of_run(tx, run, limit=limit, after_seq=after_seq)
        used = usage.of_operations(tx, [one.id for one in page])
    if as_json:
        print_json({"operations": [schemas.operation(one, used.get(one.id)) for one in page]})
        return
    headings = ("seq", "kind", "status", "accepted", "took s", "tokens", "device-s")
    rows = [_row(one, used.get(one.id)) for one in page]
    print_table(headings, rows, numbers=[0, 4, 5, 6], empty="no operation yet")
    for one in page:
        if one.error is not None:
            click.echo(f"seq {one.seq}: {one.error}")
    if len(page) == limit:
        click.echo(f"more: --after {page[-1].seq}")


def _run_row(run: Run, num_open: int, waits_for: str) -> tuple[object, ...]:
    return (run.base_model, run.state_seq, num_open, waits_for, _when(run.last_request_at))


def _row(one: Operation, used: Usage | None) -> tuple[object, ...]:
    took_s = "" if one.finished_at is None else f"{(one.finished_at - one.accepted_at).total_seconds():.1f}"
    tokens = 0 if used is None else used.tokens_trained + used.tokens_prefilled + used.tokens_sampled
    device_s = "" if used is None else f"{device_seconds(used.device_ns):.3f}"
    return (one.seq, one.kind, one.status, _when(one.accepted_at), took_s, tokens or "", device_s)


def _when(moment: datetime) -> str:
    """Short, in the zone of whoever reads it."""
    return moment.astimezone().strftime("%m-%d %H:%M")
