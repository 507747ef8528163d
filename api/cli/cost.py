"""`piecework cost`: what every account and run has used, and what that costs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import click
from sqlalchemy import Connection

from api.cli.errors import CliError
from api.cli.named import get_account
from api.cli.opened import opened
from api.cli.options import NUMBER, data_dir_option, json_option, project_option
from api.cli.output import print_groups, print_json
from api.cli.values import parse_moment
from billing import cost as billed
from billing import rating
from billing.cost import CostReport, CostRow
from billing.money import plain
from billing.usage_totals import Scope
from storage import accounts, runs
from storage.errors import RowNotFoundError


@click.command()
@click.option("--run", "run_id", help="Only this training run.")
@click.option("--session", "session_id", help="Only this session.")
@project_option("Only this project.")
@click.option("--key", "api_key_id", type=NUMBER, help="Only what this API key was used for; its number.")
@click.option("--batch", help="Only sessions with the tag batch:NAME.")
@click.option("--account", "account_name", help="Only this account.")
@click.option("--since", help="Only what finished since: 2026-01-31, 2026-01-31T12:00:00+00:00, or 90m, 24h, 7d ago.")
@json_option
@data_dir_option
def cost(
    *,
    run_id: str | None,
    session_id: str | None,
    project_id: str | None,
    api_key_id: int | None,
    batch: str | None,
    account_name: str | None,
    since: str | None,
    as_json: bool,
    data_dir: Path,
) -> None:
    """Show usage and cost per account, run and kind of operation or storage."""
    with opened(data_dir) as storage, storage.database.read() as tx:
        account = get_account(tx, account_name) if account_name else None
        moment = parse_moment(since, "--since", now=storage.database.now(tx)) if since else None
        _check(tx, run_id=run_id, session_id=session_id, api_key_id=api_key_id)
        scope = Scope(
            account_id=account.id if account else None,
            project_id=project_id,
            api_key_id=api_key_id,
            session_id=session_id,
            batch=batch,
            run_id=run_id,
            since=moment,
        )
        report = billed.report(tx, scope)
        empty = "" if report.rows else _nothing(tx, project_id=project_id, batch=batch)
    if as_json:
        print_json(report.as_json())
        return
    groups = [(title, [_row(row) for row in rows]) for title, rows in _by_run(report)]
    if groups:
        groups.append((("total", ""), [_total(report)]))
    headings = ("operation", "device", "number", "device-s", "used", report.currency)
    print_groups(("account", "run"), headings, groups, numbers=[2, 3, 5], folds=[4], empty=empty)


def _check(tx: Connection, *, run_id: str | None, session_id: str | None, api_key_id: int | None) -> None:
    """What is asked for by an id has to be there."""
    if run_id is not None:
        runs.get_run(tx, run_id)
    if session_id is not None and not runs.is_any_session(tx, id=session_id):
        raise RowNotFoundError("session", session_id)
    if api_key_id is not None and not accounts.is_key(tx, api_key_id):
        raise CliError(f"there is no key {api_key_id}: see `piecework keys list`")


def _nothing(tx: Connection, *, project_id: str | None, batch: str | None) -> str:
    """What to say where nothing was used: whether there is such a project or batch at all."""
    if project_id is not None and not runs.is_any_session(tx, project_id=project_id):
        return f"nothing has been used yet: no session was of project {project_id!r}"
    if batch is not None and not runs.is_any_session(tx, batch=batch):
        return f"nothing has been used yet: no session had the tag 'batch:{batch}'"
    return "nothing has been used yet"


def _by_run(report: CostReport) -> Iterator[tuple[tuple[str, str], Iterator[CostRow]]]:
    return itertools.groupby(sorted(report.rows, key=_title), key=_title)


def _title(row: CostRow) -> tuple[str, str]:
    """Account and run; what is sampled from no run of the account is by its base model."""
    return row.account, row.usage.run_id or f"(samples of {row.usage.base_model} as it is, or of published weights)"


def _row(row: CostRow) -> tuple[object, ...]:
    used = row.usage
    told = _told(rating.tokens(used), used.byte_seconds)
    device_s = _seconds(used.device_ns) if used.operations else ""
    return (used.kind, used.device or "", used.operations or "", device_s, told, plain(row.cost))


def _total(report: CostReport) -> tuple[object, ...]:
    used = _told(report.tokens, report.byte_seconds)
    return ("", "", report.operations, _seconds(report.device_ns), used, plain(report.cost))


def _told(tokens: Mapping[str, int], byte_seconds: int) -> str:
    """What was used besides device time."""
    counted = [f"{kind} {number:,}" for kind, number in tokens.items() if number]
    stored = [f"{rating.gigabyte_hours(byte_seconds):.3f} GB-hours"] if byte_seconds else []
    return ", ".join(counted + stored)


def _seconds(nanoseconds: int) -> str:
    return f"{rating.device_seconds(nanoseconds):.3f}"
