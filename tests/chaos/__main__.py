"""`python -m tests.chaos`: kill, stop and cut off a real service while real clients train; then check everything."""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.chaos import campaign, report
from tests.chaos.campaign import Plan
from tests.chaos.faults import Struck
from tests.chaos.schedule import SetUp, all_kinds
from tests.chaos.servers import BrokerKind


@click.command(context_settings={"show_default": True})
@click.option(
    "--kills", type=click.IntRange(min=0), default=40, help="Faults; each comes after progress since the last."
)
@click.option("--seed", type=int, default=1, help="The same seed gives the same faults in the same order.")
@click.option(
    "--setup",
    type=click.Choice(["embedded", "deployed"]),
    default="embedded",
    help="`piecework serve`, or two workers, two api processes and a scheduler on servers of their own.",
)
@click.option("--broker", type=click.Choice(["rabbitmq", "valkey"]), default="rabbitmq", help="Of the deployed set-up.")
@click.option("--minutes", type=float, default=math.inf, help="No fault is begun after so long.")
@click.option(
    "--only",
    multiple=True,
    metavar="TEXT",
    help="Only faults whose kind contains this: `kill: api`, `stop`, `committed`. May be given several times.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the findings to this file too.")
@click.option("--keep", is_flag=True, help="Keep data and logs also when everything holds.")
@click.option("--verbose", is_flag=True, help="A line for each fault.")
def main(
    *,
    kills: int,
    seed: int,
    setup: SetUp,
    broker: BrokerKind,
    minutes: float,
    only: tuple[str, ...],
    json_file: Path | None,
    keep: bool,
    verbose: bool,
) -> None:
    """Train and sample with three real clients while processes are killed, stopped and cut off; then check that nothing
    was lost.

    Half of the faults come at random moments, the others at the named points of storage/failpoints.py. A first round
    without faults gives the losses, tokens and bills that every later round must repeat, bit for bit. Exit status 1 if
    a check fails; data and logs are kept then.

    \b
    Examples:
      python -m tests.chaos --kills 20 --verbose
      python -m tests.chaos --only "kill: api" --only "cut: clients"
      python -m tests.chaos --setup deployed --broker valkey --kills 200 --seed 7 --json found.json
    """
    if none := [part for part in only if not any(part in kind for kind in all_kinds(setup))]:
        some = [kind for kind in all_kinds(setup) if "at a point" not in kind]
        there_are = f"{', '.join(some)}, and `ACT at a point: POINT` for every point of storage/failpoints.py"
        raise click.UsageError(f"--only {none[0]!r}: there is no such fault. There are {there_are}.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # everything that was started is ended first
    console = Console(emoji=False)
    directory = Path(tempfile.mkdtemp(prefix="piecework-chaos-"))
    plan = Plan(setup, seed, kills, broker, minutes, only)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(f"{setup}, seed {seed}", total=kills)

        def on_fault(struck: Struck) -> None:
            progress.update(bar, advance=int(struck.happened), description=str(struck.fault))
            if verbose:
                hit = f"hit {struck.role}, next result after {struck.result_after_s:.1f} s"
                what = hit if struck.happened else "nobody came by"
                progress.print(f"{struck.fault}: {what}", highlight=False)

        outcome = campaign.run(plan, directory, on_fault)
    report.show(outcome, directory, console)
    if json_file:
        json_file.write_text(json.dumps(report.as_json(outcome, directory), indent=1) + "\n")
    if outcome.passed and not keep:
        shutil.rmtree(directory)
    sys.exit(not outcome.passed)


if __name__ == "__main__":
    main()
