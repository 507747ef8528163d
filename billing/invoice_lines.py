"""Lines of an invoice: its ledger entries, grouped by what they are for, and the way back from a line to its entries.

What always holds: every entry of an invoice but its rounding belongs to exactly one line, because a line is all entries
that agree in the columns of `GROUP`, and a line carries their values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, func, select

from billing import ledger, money
from billing.ledger import Entry, EntryKind
from storage import billing_tables

_entry = billing_tables.ledger_entry
_usage = billing_tables.usage_record
_storage = billing_tables.storage_usage
_corrected = billing_tables.ledger_entry.alias("corrected")

GROUP: Mapping[str, ColumnElement[Any]] = {
    "kind": _entry.c.kind,
    "project": _entry.c.project_id,
    "operation": _usage.c.kind,
    "storage": _storage.c.kind,
    "base_model": func.coalesce(_usage.c.base_model, _storage.c.base_model),
    "device": _usage.c.device,
    "rate_card": _entry.c.rate_card_id,
    "note": _entry.c.note,
}
"""What the entries of a line have in common; an adjustment has operation, model and device of what it corrects."""

_ORDER = {kind: place for place, kind in enumerate(EntryKind)}
_QUANTITIES = ("device_ns", "tokens_trained", "tokens_prefilled", "tokens_cached", "tokens_sampled")
PAGE_ROWS = 500


@dataclass(frozen=True)
class Line:
    """Entries of an invoice that are for the same.

    Attributes:
        group: their common values, by the names of `GROUP`.
        entries: how many there are.
        quantities: what they used, added up: nanoseconds, tokens, byte-seconds; those that are 0 are left out.
        units: their sum, in `money.SCALE`-ths.
    """

    group: Mapping[str, Any]
    entries: int
    quantities: Mapping[str, int]
    units: int

    @property
    def amount(self) -> Decimal:
        """The sum in the currency."""
        return money.from_units(self.units)


def of_invoice(tx: Connection, invoice_id: int) -> Sequence[Line]:
    """The lines, charges first; the invoice's rounding is none."""
    used = [func.coalesce(func.sum(_usage.c[name]), 0).label(name) for name in _QUANTITIES]
    units, bytes_ = money.sum_columns(_entry.c.amount), money.sum_columns(func.coalesce(_storage.c.byte_seconds, 0))
    labels = [column.label(name) for name, column in GROUP.items()]
    sums = [*used, *(column.label(f"sum_{place}") for place, column in enumerate((*units, *bytes_)))]
    query = _joined(select(*labels, func.count().label("entries"), *sums)).where(*_on(invoice_id))
    lines = [_line(row._mapping) for row in tx.execute(query.group_by(*GROUP.values()))]
    return sorted(lines, key=_place)


def trace(tx: Connection, invoice_id: int, group: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Ledger entries of a line, oldest first, each with the usage record or the hour of storage that it charges.

    Args:
        group: the line's values, by the names of `GROUP`.
    """
    columns = (
        *(_entry.c[name].label(name) for name in ("id", "source", "kind", "created_at", "amount", "corrects_id")),
        *(_entry.c[name].label(name) for name in ("project_id", "api_key_id", "session_id", "batch", "run_id")),
        *(_entry.c.rate_card_id, _entry.c.note),
        *(_usage.c[name].label(f"usage_{name}") for name in ("id", "operation_id", "kind", "base_model", "device")),
        *(_usage.c[name].label(f"usage_{name}") for name in (*_QUANTITIES, "attempt", "finished_at")),
        *(_storage.c[name].label(f"storage_{name}") for name in ("id", "kind", "hour", "byte_seconds")),
    )
    for page in _pages(tx, _joined(select(*columns)).where(*_on(invoice_id), *_same(group))):
        yield from (row._mapping for row in page)


def entries(tx: Connection, invoice_id: int, group: Mapping[str, Any] | None = None) -> Iterator[Sequence[Entry]]:
    """Ledger entries of an invoice but for its rounding, or of one line of it, oldest first, page by page."""
    query = _joined(select(_entry)).where(*_on(invoice_id), *(() if group is None else _same(group)))
    for page in _pages(tx, query):
        yield [ledger.entry_of(row._mapping) for row in page]


def _pages(tx: Connection, query: Select[Any]) -> Iterator[Sequence[Any]]:
    last = 0
    while page := tx.execute(query.where(_entry.c.id > last).order_by(_entry.c.id).limit(PAGE_ROWS)).all():
        yield page
        last = page[-1].id


def _same(group: Mapping[str, Any]) -> Sequence[ColumnElement[bool]]:
    return [column.is_not_distinct_from(group[name]) for name, column in GROUP.items()]


def _joined(query: Select[Any]) -> Select[Any]:
    operation_id = func.coalesce(_entry.c.operation_id, _corrected.c.operation_id)
    storage_id = func.coalesce(_entry.c.storage_usage_id, _corrected.c.storage_usage_id)
    joined = _entry.outerjoin(_corrected, _corrected.c.id == _entry.c.corrects_id)
    joined = joined.outerjoin(_usage, _usage.c.operation_id == operation_id)
    return query.select_from(joined.outerjoin(_storage, _storage.c.id == storage_id))


def _on(invoice_id: int) -> tuple[ColumnElement[bool], ...]:
    return _entry.c.invoice_id == invoice_id, _entry.c.kind != EntryKind.ROUNDING


def _line(row: Any) -> Line:
    group = {name: row[name] for name in GROUP}
    quantities = {name: int(row[name]) for name in _QUANTITIES}
    quantities["byte_seconds"] = money.sum_of(row["sum_2"], row["sum_3"])
    charged = group["kind"] == EntryKind.CHARGE
    shown = {name: number for name, number in quantities.items() if number and charged}
    return Line(group, row["entries"], shown, money.sum_of(row["sum_0"], row["sum_1"]))


def _place(line: Line) -> tuple[Any, ...]:
    kind, *others = line.group.values()
    return _ORDER[EntryKind(kind)], *(str(value or "") for value in others)
