"""`piecework billing entries`: the ledger of an account, entry by entry."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from api.cli.named import get_account
from api.cli.opened import opened
from api.cli.options import NUMBER, WholeNumber, account_option, data_dir_option, json_option, project_option
from api.cli.output import moment, print_json, print_table
from api.cli.values import parse_moment
from billing import ledger, money, rate_cards
from billing.ledger import Entry, EntryKind
from storage import runs


@click.command()
@account_option
@click.option(
    "--kind",
    "kinds",
    type=click.Choice([str(each) for each in EntryKind]),
    multiple=True,
    help="Only of this kind; may be given several times.",
)
@click.option("--run", "run_id", help="Only of this training run.")
@project_option("Only of this project.")
@click.option("--since", help="Only what was booked since: 2026-01-31, 2026-01-31T12:00:00, or 90m, 24h, 7d ago.")
@click.option("--before", "before_id", type=NUMBER, help="Only those before this entry, a number of the list.")
@click.option("--limit", type=WholeNumber(1, 10_000), default=50, show_default=True, help="At most so many.")
@json_option
@data_dir_option
def entries(
    *,
    account_name: str,
    kinds: Sequence[str],
    run_id: str | None,
    project_id: str | None,
    since: str | None,
    before_id: int | None,
    limit: int,
    as_json: bool,
    data_dir: Path,
) -> None:
    """Show ledger entries, newest first: charges, payments, credits, corrections and roundings.

    Amounts are what an account owes: a charge is positive, a payment negative. Numbers are those that `billing adjust`
    takes.
    """
    with opened(data_dir) as storage, storage.database.read() as tx:
        account = get_account(tx, account_name)
        if run_id is not None:
            runs.get_run(tx, run_id, account_id=account.id)
        found = ledger.list_entries(
            tx,
            account.id,
            kinds=kinds,
            run_id=run_id,
            project_id=project_id,
            since=parse_moment(since, "--since", now=storage.database.now(tx)) if since else None,
            before_id=before_id,
            limit=limit + 1,
        )
        found, has_more = found[:limit], len(found) > limit
        currency = rate_cards.currency(tx)
    if as_json:
        print_json({"currency": currency, "entries": [_as_json(entry) for entry in found]})
        return
    table = [
        (
            entry.id,
            moment(entry.created_at),
            entry.kind,
            _what_for(entry),
            entry.dimensions.project_id or "",
            entry.invoice_id or "",
            money.plain(entry.amount),
        )
        for entry in found
    ]
    headings = ("entry", "booked", "kind", "what for", "project", "invoice", currency)
    print_table(headings, table, numbers=[0, 5, 6], folds=[3], empty="no entry" if before_id else "no entry yet")
    if has_more:
        click.echo(f"more: --before {found[-1].id}")


def _what_for(entry: Entry) -> str:
    if entry.kind == EntryKind.CHARGE and entry.note:
        return f"{entry.source}, {entry.note}"
    return entry.note or entry.source


def _as_json(entry: Entry) -> dict[str, object]:
    whom = entry.dimensions
    return {
        "id": entry.id,
        "created_at": entry.created_at.isoformat(),
        "kind": entry.kind,
        "source": entry.source,
        "amount": money.plain(entry.amount),
        "project": whom.project_id,
        "key": whom.api_key_id,
        "session": whom.session_id,
        "batch": whom.batch,
        "run": whom.run_id,
        "corrects": entry.corrects_id,
        "note": entry.note,
        "invoice": entry.invoice_id,
    }
