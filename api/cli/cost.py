"""`piecework cost`: what every account and run has used, and what that costs."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from api.cli.errors import CliError
from api.cli.opened import opened
from api.cli.options import NUMBER, data_dir_option, json_option
from api.cli.output import print_json, print_table
from api.parameters import FIRST_YEAR, LAST_YEAR
from billing import cost as billed
from billing.money import plain
from billing.rating import device_seconds, gigabyte_hours
from billing.usage_totals import Scope
from storage import runs
from storage.accounts import get_account

_AGO = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@click.command()
@click.option("--run", "run_id", help="Only this training run.")
@click.option("--session", "session_id", help="Only this session.")
@click.option("--project", "project_id", help="Only this project.")
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
        if run_id is not None:
            runs.get_run(tx, run_id)
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
    if as_json:
        print_json(report.as_json())
        return
    headings = (
        "account",
        "run",
        "operation",
        "device",
        "number",
        "device-s",
        "trained",
        "prefilled",
        "sampled",
        "GB-hours",
    )
    rows: list[tuple[object, ...]] = [
        (
            row.account,
            row.usage.run_id or "",
            row.usage.kind,
            row.usage.device,
            row.usage.operations or "",
            f"{device_seconds(row.usage.device_ns):.3f}",
            row.usage.tokens_trained,
            row.usage.tokens_prefilled,
            row.usage.tokens_sampled,
            f"{gigabyte_hours(row.usage.byte_seconds):.3f}" if row.usage.byte_seconds else "",
            plain(row.cost),
        )
        for row in report.rows
    ]
    if rows:
        stored = f"{gigabyte_hours(report.byte_seconds):.3f}" if report.byte_seconds else ""
        total = (report.operations, f"{device_seconds(report.device_ns):.3f}", "", "", "", stored, plain(report.cost))
        rows.append(("total", "", "", "", *total))
    print_table((*headings, report.currency), rows, numbers=range(4, 11), empty="nothing has been used yet")


def parse_moment(text: str, option: str, *, now: datetime) -> datetime:
    """A day, a moment, or a time ago; what has no time zone is UTC.

    Args:
        option: where it was written, for messages.

    Raises:
        CliError: none of these, or too far away to be reckoned with.
    """
    try:
        moment = _parsed(text, now)
    except OverflowError:
        moment = None
    except ValueError as error:
        raise CliError(
            f"{option} {text!r} is no time: write 2026-01-31, 2026-01-31T12:00:00, or 90m, 24h, 7d"
        ) from error
    if moment is None or not FIRST_YEAR <= moment.year <= LAST_YEAR:
        raise CliError(f"{option} {text!r} is too far away: name a time in the years {FIRST_YEAR} to {LAST_YEAR}")
    return moment


def _parsed(text: str, now: datetime) -> datetime:
    if match := _AGO.fullmatch(text):
        return now - timedelta(**{_UNITS[match[2]]: float(match[1])})
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
