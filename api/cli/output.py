"""How commands print: a table for people, JSON for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import click
from rich.console import Console
from rich.table import Table


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    click.echo(json.dumps(value, ensure_ascii=False))


def print_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    numbers: Iterable[int] = (),
    whole: Iterable[int] = (),
    empty: str,
) -> None:
    """A table whose columns `numbers` stand to the right; `empty` is said where there is no row.

    Args:
        whole: columns that are never broken: in a narrow terminal the others are.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    right, unbroken = set(numbers), set(whole)
    for index, heading in enumerate(headings):
        justify: Literal["right", "left"] = "right" if index in right else "left"
        table.add_column(heading, justify=justify, overflow="fold", no_wrap=index in unbroken)
    for row in rows:
        table.add_row(*map(str, row))
    if not table.row_count:
        click.echo(empty)
        return
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 240
    console.print(table)
