"""`piecework billing verify`: are all charges what usage and prices say?"""

from __future__ import annotations

from pathlib import Path

import click

from api.cli.opened import opened
from api.cli.options import data_dir_option, json_option
from api.cli.output import print_json, print_table, progress
from billing import verify as checks
from storage.patience import unhurried


@click.command()
@json_option
@data_dir_option
def verify(*, as_json: bool, data_dir: Path) -> None:
    """Price all usage anew and show every charge that differs; exit code 1 if there is one."""
    with opened(data_dir) as storage, storage.database.read() as tx, unhurried(tx):
        total = checks.num_rows(tx)
        with progress() as bars:
            bar = bars.add_task("verifying", total=total)
            found = list(checks.differences(tx, seen=lambda rows: bars.advance(bar, rows)))
    if as_json:
        print_json({"rows": total, "differences": [{**each.__dict__, "wrong": str(each.wrong)} for each in found]})
    else:
        print_table(
            ("what", "source", "entry", "expected", "found"),
            [(each.wrong, each.source, each.entry_id or "", each.expected, each.found) for each in found],
            numbers=[2],
            folds=[1, 3, 4],
            empty=f"no difference in {total} rows",
        )
    if found:
        raise click.exceptions.Exit(1)
