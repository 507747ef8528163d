"""`piecework billing reconcile`: is all busy time of the workers either billed or in vain?"""

from __future__ import annotations

import dataclasses
from decimal import Decimal
from pathlib import Path

import click

from api.cli.opened import opened
from api.cli.options import data_dir_option, json_option
from api.cli.output import moment, print_json, print_table
from billing import reconciliation


@click.command()
@json_option
@data_dir_option
def reconcile(*, as_json: bool, data_dir: Path) -> None:
    """Hold billed device time and overhead against the workers' busy clocks; exit code 1 if they drift over 0.1 %.

    Overhead is what is never billed: failed attempts, replays, discarded work. Each worker's figures are
    those since its start. Once an hour what was added since the time before is judged: the newest ten alarms of that
    are shown below, and do not set the exit code.
    """
    with opened(data_dir) as storage, storage.database.read() as tx:
        found, alarms = reconciliation.reconcile(tx), reconciliation.alarms(tx)
    if as_json:
        balances = [
            {**dataclasses.asdict(balance), "drift_ns": balance.drift_ns, "drift_ppm": balance.drift_ppm}
            for balance in found.balances
        ]
        told = [{**dataclasses.asdict(alarm), "created_at": alarm.created_at.isoformat()} for alarm in alarms]
        print_json({"workers": balances, "drift_ppm": found.drift_ppm, "alarm": found.alarm, "alarms": told})
    else:
        rows = [
            (
                balance.worker_id,
                *(
                    _seconds(nanoseconds)
                    for nanoseconds in (
                        balance.busy_ns,
                        balance.billed_ns,
                        balance.overhead_ns,
                        balance.under_way_ns,
                        balance.drift_ns,
                    )
                ),
                _percent(balance.drift_ppm),
            )
            for balance in found.balances
        ]
        headings = ("worker", "busy s", "billed s", "overhead s", "under way s", "drift s", "drift")
        print_table(headings, rows, numbers=[1, 2, 3, 4, 5, 6], empty="no worker has been busy yet")
        for alarm in alarms:
            worker = alarm.worker_id or reconciliation.TOGETHER
            off = f"off by {_seconds(alarm.drift_ns)} s, {_percent(alarm.drift_ppm)}"
            click.echo(f"alarm at {moment(alarm.created_at)}: {worker}: {off}")
    if found.alarm:
        raise click.exceptions.Exit(1)


def _percent(ppm: int) -> str:
    return f"{Decimal(ppm) / 10_000:.4f} %"


def _seconds(nanoseconds: int) -> str:
    return f"{Decimal(nanoseconds) / 10**9:.6f}"
