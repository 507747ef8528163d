"""How commands print: tables for people, JSON for programs."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import zip_longest
from typing import Any

import click
from rich.cells import cell_len
from rich.console import Console
from rich.progress import Progress, ProgressColumn
from rich.text import Text

FOLDED_MIN = 20
"""A column that may be broken over lines is no narrower than this, unless its widest cell is."""

_GAP = "  "
_ENDLESS = 100_000

Row = Sequence[str]


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    click.echo(json.dumps(value, ensure_ascii=False))


def moment(at: datetime | str | None) -> str:
    """A time, or its ISO text, as tables show it and options take it: UTC, to the second; nothing for None."""
    if at is None:
        return ""
    parsed = datetime.fromisoformat(at) if isinstance(at, str) else at
    return f"{parsed.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def progress(*columns: ProgressColumn | str) -> Progress:
    """A progress bar for people: on standard error, gone at the end, and not there where no terminal is."""
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def print_table(
    headings: Row,
    rows: Iterable[Sequence[object]],
    *,
    numbers: Iterable[int] = (),
    folds: Iterable[int] = (),
    empty: str,
) -> None:
    """A table for people; `empty` is said where there is no row.

    Only the columns `folds` are ever broken over lines. Where the terminal is too narrow for that, a row becomes lines
    of its own, a heading and a value each. What is no terminal has a line per row, however long, unless
    `COLUMNS` is set.

    Args:
        numbers: columns that stand to the right.
    """
    _print(headings, [((), _cells(rows))], numbers=numbers, folds=folds, empty=empty)


def print_groups(
    titled: Row,
    headings: Row,
    groups: Iterable[tuple[Row, Iterable[Sequence[object]]]],
    *,
    numbers: Iterable[int] = (),
    folds: Iterable[int] = (),
    empty: str,
) -> None:
    """The same in groups, each under a title of its own; what is no terminal has the title in columns called `titled`.

    Args:
        numbers, folds: columns of `headings`, counted without the titles.
    """
    told = [(title, _cells(rows)) for title, rows in groups]
    if _available() == _ENDLESS:
        told = [((), [[*title, *row] for title, rows in told for row in rows])]
        headings = [*titled, *headings]
        numbers, folds = ([len(titled) + place for place in places] for places in (numbers, folds))
    _print(headings, told, numbers=numbers, folds=folds, empty=empty)


def _print(
    headings: Row,
    groups: Sequence[tuple[Row, Sequence[Row]]],
    *,
    numbers: Iterable[int],
    folds: Iterable[int],
    empty: str,
) -> None:
    all_rows = [row for _, rows in groups for row in rows]
    if not all_rows:
        click.echo(empty)
        return
    widths = _widths([headings, *all_rows], sorted(folds), _available())
    lines = _as_records(headings, groups) if widths is None else _as_columns(headings, groups, widths, set(numbers))
    for line in lines:
        click.echo(line.rstrip())


def _cells(rows: Iterable[Sequence[object]]) -> Sequence[Row]:
    """As text, each on one line: what people write as a reason or a name may have several."""
    return [[" ".join(str(cell).split()) for cell in row] for row in rows]


def _folded(cell: str, width: int) -> Sequence[str]:
    if cell_len(cell) <= width:
        return [cell]
    return [line.plain.rstrip() for line in Text(cell).wrap(Console(), width)]


def _as_columns(
    headings: Row, groups: Iterable[tuple[Row, Sequence[Row]]], widths: Sequence[int], numbers: Collection[int]
) -> Iterator[str]:
    def aligned(row: Row) -> str:
        pads = (" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
        cells = enumerate(zip(row, pads, strict=True))
        return _GAP.join(f"{pad}{cell}" if place in numbers else f"{cell}{pad}" for place, (cell, pad) in cells)

    yield click.style(aligned(headings).rstrip(), bold=True)
    for title, rows in groups:
        if title:
            yield click.style(_GAP.join(filter(None, title)), bold=True)
        for row in rows:
            folded = [_folded(cell, width) for cell, width in zip(row, widths, strict=True)]
            for cells in zip_longest(*folded, fillvalue=""):
                yield aligned(cells)


def _as_records(headings: Row, groups: Iterable[tuple[Row, Sequence[Row]]]) -> Iterator[str]:
    widest = max(map(cell_len, headings))
    for place, (title, row) in enumerate((title, row) for title, rows in groups for row in rows):
        if place:
            yield ""
        if title:
            yield click.style(_GAP.join(filter(None, title)), bold=True)
        for heading, cell in zip(headings, row, strict=True):
            if cell:
                yield f"{heading}{' ' * (widest - cell_len(heading))}{_GAP}{cell}"


def _available() -> int:
    is_known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return shutil.get_terminal_size().columns if is_known else _ENDLESS


def _widths(rows: Sequence[Row], folds: Collection[int], available: int) -> list[int] | None:
    """How wide each column is; None if not even the narrowest fit."""
    natural = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    widths = [min(width, FOLDED_MIN) if place in folds else width for place, width in enumerate(natural)]
    room = available - sum(widths) - len(_GAP) * (len(widths) - 1)
    if room < 0:
        return None
    for place in folds:
        wider = min(room, natural[place] - widths[place])
        widths[place] += wider
        room -= wider
    return widths
