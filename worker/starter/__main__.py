"""`python -m worker.starter`: makes the starter model and shows how it learns."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from worker.starter import make
from worker.starter.school import Progress as Step
from worker.starter.school import Recipe, StarterModelError
from worker.starter.version import version


@click.command(help=__doc__)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory of the model. Default: starter-<version> in $PIECEWORK_CACHE_DIR or ~/.cache/piecework.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of weights, lessons and examination.")
def main(out: Path | None, seed: int) -> None:
    """Make the model, and print its text loss and its share of right additions."""
    console = Console(stderr=True)
    directory = out or make.default_cache_dir().expanduser() / f"starter-{version()}"
    wall_at, cpu_at = time.monotonic(), time.process_time()
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True
    ) as bar:
        task = bar.add_task("starter model", total=Recipe().steps_typical)

        def show(step: Step) -> None:
            text = f"starter model: loss {step.text_loss:.2f}, additions right {step.share_right:.0%}"
            bar.update(task, completed=step.step, description=text)

        try:
            make.make_starter_model(directory, seed=seed, report=show)
        except (StarterModelError, FileExistsError) as error:
            raise click.ClickException(str(error)) from error
    made = json.loads((directory / make.MARKER).read_text(encoding="utf-8"))
    console.print(
        f"text loss {made['text_loss']:.2f}, additions right {made['share_right']:.0%}, {made['steps']} steps; "
        f"this call took {time.monotonic() - wall_at:.0f} s and {time.process_time() - cpu_at:.0f} s of CPU"
    )
    click.echo(directory)


if __name__ == "__main__":
    main()
