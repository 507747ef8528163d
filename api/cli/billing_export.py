"""`piecework billing export` and `rebuild-rollups`: usage for other programs, and its sums by the hour made anew."""

from __future__ import annotations

from pathlib import Path

import click

from api.cli.errors import CliError
from api.cli.named import get_account
from api.cli.opened import opened
from api.cli.options import data_dir_option, json_option
from api.cli.output import print_json, progress
from api.cli.values import parse_moment
from billing import exports, rollups
from billing.export_files import Format
from billing.exports import Export
from storage.object_url import redact
from storage.objects import SIGNED_URL_S_MAX
from storage.open import Storage


@click.command()
@click.option("--from", "since", required=True, help="Begin: a day or a moment, UTC, or 90m, 24h, 7d ago.")
@click.option("--to", "until", help="End, which is not in it; now, if none is named.")
@click.option(
    "--format",
    "file_format",
    type=click.Choice([str(each) for each in Format]),
    default=str(Format.CSV),
    show_default=True,
    help="cloudevents: a JSON event per line, for OpenMeter, Lago or Stripe.",
)
@click.option("--account", "account_name", help="Only this account.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write it to this file; into the object store, if none is named.",
)
@json_option
@data_dir_option
def export(
    *,
    since: str,
    until: str | None,
    file_format: str,
    account_name: str | None,
    output: Path | None,
    as_json: bool,
    data_dir: Path,
) -> None:
    """Write usage, line by line and with its charges, to a file or into the object store.

    A line is an operation, or what a run kept in an hour. Amounts are exact and add up to the ledger's charges.
    """
    with opened(data_dir) as storage:
        chosen = _chosen(storage, since, until, Format(file_format), account_name)
        written: list[int] = []
        with progress() as bars:
            bar = bars.add_task("exporting", total=chosen.num_lines(storage.database))

            def on_page(lines: int) -> None:
                written.append(lines)
                bars.advance(bar, lines)

            if output is None:
                key = exports.store(storage.database, storage.objects, chosen, on_page=on_page)
                store_url = redact(storage.settings.resolved_object_store_url()).partition("?")[0].rstrip("/")
                url = storage.objects.signed_url(key, expires_s=SIGNED_URL_S_MAX)
                told = {"key": key, "at": f"{store_url}/{key}", "url": url}
            else:
                with output.open("wb") as file:
                    chosen.write(storage.database, file, on_page=on_page)
                told = {"file": str(output)}
    if as_json:
        print_json({"lines": sum(written), **told})
    else:
        click.echo("\n".join(value for name, value in told.items() if value and name != "key"))


@click.command("rebuild-rollups")
@json_option
@data_dir_option
def rebuild_rollups(*, as_json: bool, data_dir: Path) -> None:
    """Make the sums of usage by the hour anew from usage records; costs are read exactly all the while.

    Needed only if something other than piecework has changed them. Nothing is charged or told to webhooks again.
    """
    with opened(data_dir) as storage:
        rollups.rebuild(storage.database)
    if as_json:
        print_json({"rebuilt": True})
    else:
        click.echo("all rollups are made anew")


def _chosen(storage: Storage, since: str, until: str | None, file_format: Format, account_name: str | None) -> Export:
    with storage.database.read() as tx:
        now = storage.database.now(tx)
        account_id = get_account(tx, account_name).id if account_name else None
    first, end = parse_moment(since, "--from", now=now), parse_moment(until, "--to", now=now) if until else now
    if first >= end:
        raise CliError(f"--from {first.isoformat()} must be before --to {end.isoformat()}")
    return Export(first, end, file_format, account_id)
