"""`piecework status`: what runs, what waits, what is served."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import click
from sqlalchemy import func, select

from api.cli import process_table
from api.cli.opened import opened
from api.cli.options import data_dir_option, json_option
from api.cli.output import print_json
from billing import budgets
from storage import base_models, journal, tables, workers
from storage.workers import Worker

WORKER_SILENT_S = 60.0


@click.command()
@json_option
@data_dir_option
def status(as_json: bool, data_dir: Path) -> None:
    """Show the processes of the embedded service, how much work is queued, and the base models."""
    processes = process_table.read(data_dir)
    with opened(data_dir) as storage, storage.database.read() as tx:
        queued = select(func.count()).where(tables.operation.c.status == journal.Status.QUEUED)
        queue_depth = tx.execute(queued).scalar_one()
        models = [model.name for model in base_models.list_base_models(tx)]
        since = storage.database.now(tx) - timedelta(seconds=WORKER_SILENT_S)
        living = workers.list_workers(tx, seen_after=since)
        alarms = workers.count_alarms(tx)
        without_room = [one for one in budgets.list_budgets(tx, None, now=storage.database.now(tx)) if one.lacks_room]
    if as_json:
        rows = [{"role": one.role, "pid": one.pid} for one in processes]
        print_json(
            {
                "processes": rows,
                "queue_depth": queue_depth,
                "base_models": models,
                "workers": [_row(worker) for worker in living],
                "alarms": asdict(alarms),
                "budgets_without_room": [budget.id for budget in without_room],
            }
        )
        return
    if processes:
        click.echo(f"running at {process_table.find_url(data_dir)}")
        for one in processes:
            click.echo(f"  {one.role:<11}{one.pid}")
    else:
        click.echo(f"no service runs in {data_dir}: piecework serve --data-dir {data_dir}")
    for worker in living:
        tail_s, replayed = worker.tail_p95_ns / 1e9, worker.num_replayed
        click.echo(f"worker {worker.id} on {worker.device}: replay tail p95 {tail_s:.1f} s, replayed {replayed}")
    if alarms.replay_mismatches:
        click.echo(f"ALARM: {alarms.replay_mismatches} replayed operations differ from what is on record; see the log")
    if alarms.damaged_snapshots:
        click.echo(f"ALARM: {alarms.damaged_snapshots} snapshots were damaged; see the log, and check the object store")
    click.echo(f"queued operations: {queue_depth}")
    if without_room:
        click.echo(
            f"caps that are spent or have no room for what is asked for: {len(without_room)}; piecework budgets list"
        )
    click.echo(f"base models: {', '.join(models) or 'none; piecework models add starter'}")


def _row(worker: Worker) -> dict[str, object]:
    return {
        "id": worker.id,
        "device": worker.device,
        "replay_tail_p95_s": worker.tail_p95_ns / 1e9,
        "num_replayed": worker.num_replayed,
        "num_replay_mismatches": worker.num_replay_mismatches,
    }
