"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULT_DATA_DIR = Path(".piecework")


def _absolute(_ctx: click.Context, _param: click.Parameter, value: Path) -> Path:
    return value.expanduser().absolute()


def data_dir_option(command: Command) -> Command:
    """`--data-dir`, absolute when it arrives."""
    return click.option(
        "--data-dir",
        type=click.Path(path_type=Path, file_okay=False),
        default=DEFAULT_DATA_DIR,
        envvar="PIECEWORK_DATA_DIR",
        show_default=True,
        show_envvar=True,
        callback=_absolute,
        help="Directory of the embedded service: database, objects, broker, logs.",
    )(command)


def json_option(command: Command) -> Command:
    """`--json`, as the argument `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for programs instead of a table.")(command)
