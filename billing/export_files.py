"""Usage written to files: CSV, Parquet, or CloudEvents as JSON lines; the same usage always gives the same bytes.

Amounts are exact in each: decimal strings, or decimals of 12 places in Parquet; nanoseconds, bytes and tokens are
integers. A page of lines is in memory at a time.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from enum import StrEnum
from typing import Any, BinaryIO

from billing import cloud_events, money
from billing.usage import COUNTS
from billing.usage_lines import UsageLine

COLUMNS = tuple(field.name for field in fields(UsageLine))
DECIMAL_DIGITS = 38

Pages = Iterable[Sequence[UsageLine]]


class Format(StrEnum):
    """What a file holds."""

    CSV = "csv"
    PARQUET = "parquet"
    CLOUDEVENTS = "cloudevents"

    @property
    def suffix(self) -> str:
        """How the file's name ends."""
        return "jsonl" if self is Format.CLOUDEVENTS else str(self)


def write(file: BinaryIO, pages: Pages, file_format: Format, *, source: str) -> None:
    """Write all pages.

    Args:
        source: of CloudEvents, which deployment they are from.
    """
    if file_format is Format.CSV:
        _write_csv(file, pages)
    elif file_format is Format.PARQUET:
        _write_parquet(file, pages)
    else:
        for line in _lines(pages):
            file.write(f"{cloud_events.text(cloud_events.event(line, source=source))}\n".encode())


def counted(pages: Pages, on_page: Callable[[int], None]) -> Iterator[Sequence[UsageLine]]:
    """The same pages; the number of lines of each is told when it is done."""
    for page in pages:
        yield page
        on_page(len(page))


def _lines(pages: Pages) -> Iterator[UsageLine]:
    return (line for page in pages for line in page)


def _write_csv(file: BinaryIO, pages: Pages) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    bare, quoted = (
        csv.writer(text, lineterminator="\n", quoting=quoting) for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
    )
    bare.writerow(COLUMNS)
    for line in _lines(pages):
        named = {"at": line.at.isoformat(), "charge": line.charge_text}
        cells = [named.get(name, getattr(line, name)) for name in COLUMNS]
        has_returns = any("\r" in cell for cell in cells if isinstance(cell, str))
        (quoted if has_returns else bare).writerow(cells)  # the writer alone takes them for no end of a line
    text.detach()


def _write_parquet(file: BinaryIO, pages: Pages) -> None:
    import pyarrow  # here, since importing it takes a while
    from pyarrow import parquet

    integers = {"api_key_id", "byte_seconds", *COUNTS}
    special = {
        "at": pyarrow.timestamp("us", tz="UTC"),
        "charge": pyarrow.decimal128(DECIMAL_DIGITS, money.SCALE_DIGITS),
    }
    types: dict[str, Any] = {
        name: special.get(name) or (pyarrow.int64() if name in integers else pyarrow.string()) for name in COLUMNS
    }
    schema = pyarrow.schema(list(types.items()))
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for page in pages:
            columns = {name: [_cell(line, name) for line in page] for name in COLUMNS}
            writer.write_table(pyarrow.table(columns, schema=schema))


def _cell(line: UsageLine, name: str) -> Any:
    if name == "charge":
        return None if line.charge is None else money.from_units(line.charge)
    return getattr(line, name)
