"""`piecework status`: what runs, what waits, what is served."""

from __future__ import annotations

from pathlib import Path

import click
from sqlalchemy import func, select

from api.cli import process_table
from api.cli.opened import opened
from api.cli.options import data_dir_option, json_option
from api.cli.output import print_json
from storage import base_models, journal, tables


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
    if as_json:
        rows = [{"role": one.role, "pid": one.pid} for one in processes]
        print_json({"processes": rows, "queue_depth": queue_depth, "base_models": models})
        return
    if processes:
        click.echo(f"running at {process_table.find_url(data_dir)}")
        for one in processes:
            click.echo(f"  {one.role:<11}{one.pid}")
    else:
        click.echo(f"no service runs in {data_dir}: piecework serve --data-dir {data_dir}")
    click.echo(f"queued operations: {queue_depth}")
    click.echo(f"base models: {', '.join(models) or 'none; piecework models add starter'}")
