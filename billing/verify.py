"""Holds every charge against what it is for: usage is priced anew, and whatever differs is said.

Pages of the two tables are read one after the other, each by one statement: usage and its charge are committed
together, so work that goes on meanwhile is no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Select, func, select

from billing import budget_checks, invoices, money, rate_cards, rating, storage_metering
from billing.charging import BOOKED_LATE, operation_source
from billing.dimensions import Dimensions
from billing.ledger import EntryKind
from billing.rate_cards import DatedCard
from billing.usage_totals import HOUR
from storage import billing_tables, tables
from storage.journal import Status

PAGE_ROWS = 1_000
_usage = billing_tables.usage_record
_storage = billing_tables.storage_usage
_span = billing_tables.storage_span
_entry = billing_tables.ledger_entry
_DIMENSIONS = tuple(Dimensions.__dataclass_fields__)
_ENTRY_COLUMNS = ("id", "source", "kind", "amount", "created_at", "rate_card_id", "note", *_DIMENSIONS)


class Wrong(StrEnum):
    """What can be wrong with a charge."""

    MISSING = "missing charge"
    SECOND = "second charge"
    WITHOUT_USAGE = "charge without usage"
    AMOUNT = "amount"
    CARD = "rate card"
    DIMENSIONS = "dimensions"
    SOURCE = "source"
    TIME = "time"
    UNBILLED = "completed without usage"
    BYTES = "byte-seconds"
    INVOICE = "invoice"
    BUDGET = "budget"


@dataclass(frozen=True)
class Difference:
    """A charge that is not what it should be.

    Attributes:
        source: what the charge is for, or should be.
        entry_id: the ledger entry; None where it is missing.
        expected, found: what it should be and is.
    """

    wrong: Wrong
    source: str
    entry_id: int | None
    expected: str
    found: str


def num_rows(tx: Connection) -> int:
    """How many rows `differences` looks at, for a progress bar."""
    looked_at = (_usage, _storage, _entry)
    return sum(tx.execute(select(func.count()).select_from(table)).scalar_one() for table in looked_at)


def differences(
    tx: Connection, *, page_rows: int = PAGE_ROWS, seen: Callable[[int], None] = lambda _: None
) -> Iterator[Difference]:
    """Everything that differs, usage records first, then hours of storage, then charges without either.

    Args:
        page_rows: rows read at a time.
        seen: told how many rows have been looked at since it was told last.
    """
    for ids in _pages(tx, _usage, page_rows):
        page = list(tx.execute(_charged_usage(ids)))
        cards = rate_cards.list_cards(tx)  # after the page: every card that it was priced by is there
        yield from _of_usage(page, cards)
        seen(len(ids))
    yield from _unbilled(tx)
    altered: set[str] = set()
    for ids in _pages(tx, _storage, page_rows):
        page = list(tx.execute(_charged_storage(ids)))
        cards = rate_cards.list_cards(tx)
        yield from _of_storage(page, cards)
        yield from _of_bytes(tx, page, altered)
        seen(len(ids))
    yield from _of_runs(tx, page_rows, altered)
    for ids in _pages(tx, _entry, page_rows):
        for row in tx.execute(_charges_without_usage(ids)):
            yield Difference(Wrong.WITHOUT_USAGE, row.source, row.id, "usage", "none")
        seen(len(ids))
    for broken in invoices.check(tx):
        yield Difference(Wrong.INVOICE, f"{broken.where}: {broken.what}", None, broken.expected, broken.found)
    for one in budget_checks.misfits(tx):
        expected, found = (money.plain(money.from_units(units)) for units in (one.expected, one.found))
        yield Difference(Wrong.BUDGET, f"budget:{one.budget_id}: {one.what}", None, expected, found)


def _pages(tx: Connection, table: Any, page_rows: int) -> Iterator[Sequence[int]]:
    last = 0
    while ids := tx.execute(select(table.c.id).where(table.c.id > last).order_by(table.c.id).limit(page_rows)):
        page = ids.scalars().all()
        if not page:
            return
        yield page
        last = page[-1]


def _unbilled(tx: Connection) -> Iterator[Difference]:
    """Completed operations without a usage record."""
    operation = tables.operation
    joined = operation.outerjoin(_usage, _usage.c.operation_id == operation.c.id)
    query = select(operation.c.id).select_from(joined)
    for (operation_id,) in tx.execute(query.where(operation.c.status == Status.COMPLETED, _usage.c.id.is_(None))):
        yield Difference(Wrong.UNBILLED, operation_source(operation_id), None, "a usage record", "none")


def _charged_usage(ids: Sequence[int]) -> Select[Any]:
    entry = [_entry.c[name].label(f"entry_{name}") for name in _ENTRY_COLUMNS]
    joined = _usage.outerjoin(_entry, _entry.c.operation_id == _usage.c.operation_id)
    return select(_usage, *entry).select_from(joined).where(_usage.c.id.in_(ids)).order_by(_usage.c.id, _entry.c.id)


def _of_usage(page: Iterable[Any], cards: Sequence[DatedCard]) -> Iterator[Difference]:
    last = None
    for row in page:
        source = operation_source(row.operation_id)
        if row.entry_id is None:
            yield Difference(Wrong.MISSING, source, None, "a charge", "none")
        elif row.operation_id == last:
            yield Difference(Wrong.SECOND, source, row.entry_id, "one charge", "another one")
        else:
            yield from _of_charged(row, source, cards)
        last = row.operation_id


def _of_charged(row: Any, source: str, cards: Sequence[DatedCard]) -> Iterator[Difference]:
    dated = _in_force(cards, row.account_id, row.finished_at)
    expected = None if dated is None else money.to_units(rating.charge(row, row.base_model, dated.card))
    if not _is_booked_in_time(row):
        yield _difference(Wrong.TIME, source, row.entry_id, row.finished_at, row.entry_created_at)
    yield from _of_entry(row, source, dated, expected)


def _is_booked_in_time(row: Any) -> bool:
    """With the end of its operation; one that says that it was booked late, then or later."""
    if row.entry_note == BOOKED_LATE:
        return bool(row.entry_created_at >= row.finished_at)
    return bool(row.entry_created_at == row.finished_at)


def _of_entry(row: Any, source: str, dated: DatedCard | None, expected: int | None) -> Iterator[Difference]:
    """What differs between what was used and its charge, which is there."""
    values = row._mapping
    whom = {name: values[name] for name in _DIMENSIONS}
    charged = {name: values[f"entry_{name}"] for name in _DIMENSIONS}
    pairs: list[tuple[Wrong, Any, Any]] = [
        (Wrong.SOURCE, (EntryKind.CHARGE.value, source), (row.entry_kind, row.entry_source)),
        (Wrong.CARD, dated and dated.id, row.entry_rate_card_id),
        (Wrong.DIMENSIONS, whom, charged),
    ]
    if expected is not None:
        pairs.append((Wrong.AMOUNT, expected, row.entry_amount))
    for wrong, right, found in pairs:
        if right != found:
            yield _difference(wrong, source, row.entry_id, right, found)


def _charged_storage(ids: Sequence[int]) -> Select[Any]:
    entry = [_entry.c[name].label(f"entry_{name}") for name in _ENTRY_COLUMNS]
    joined = _storage.outerjoin(_entry, _entry.c.storage_usage_id == _storage.c.id)
    return select(_storage, *entry).select_from(joined).where(_storage.c.id.in_(ids)).order_by(_storage.c.id)


def _of_storage(page: Iterable[Any], cards: Sequence[DatedCard]) -> Iterator[Difference]:
    """Charges for hours of storage; where it is free there is none."""
    for row in page:
        source = storage_metering.storage_source(row.id)
        dated = _in_force(cards, row.account_id, row.hour)
        expected = None if dated is None else rating.storage_charge(row.kind, row.byte_seconds, dated.card)
        if row.entry_id is not None:
            yield from _of_entry(row, source, dated, None if expected is None else money.to_units(expected))
        elif expected:
            yield Difference(Wrong.MISSING, source, None, money.plain(expected), "none")


def _of_bytes(tx: Connection, page: Iterable[Any], altered: set[str]) -> Iterator[Difference]:
    """Byte-seconds of checkpoints that are not those of their spans; their runs are added to those altered."""
    checkpoints = [row for row in page if row.kind == storage_metering.CHECKPOINT]
    for hour in sorted({row.hour for row in checkpoints}):
        rows = [row for row in checkpoints if row.hour == hour]
        run_ids = [row.run_id for row in rows]
        kept = storage_metering.checkpoint_byte_seconds(tx, run_ids, since=hour, until=hour + HOUR)
        for row in rows:
            if row.byte_seconds != kept.get(row.run_id, 0):
                altered.add(row.run_id)
                source = storage_metering.storage_source(row.id)
                yield _difference(Wrong.BYTES, source, row.entry_id, kept.get(row.run_id, 0), row.byte_seconds)


def _of_runs(tx: Connection, page_rows: int, altered: set[str]) -> Iterator[Difference]:
    """Runs whose hours do not add up to what they kept, though each hour there is is right: some are gone."""
    metered = storage_metering.metered(tx)
    if metered is None:
        return
    since, until = metered
    of_checkpoints = (_storage.c.kind == storage_metering.CHECKPOINT, _storage.c.hour < until)
    sums = money.sum_columns(_storage.c.byte_seconds)
    last = ""
    query = select(_span.c.run_id).distinct().order_by(_span.c.run_id).limit(page_rows)
    while run_ids := tx.execute(query.where(_span.c.run_id > last)).scalars().all():
        counted = select(_storage.c.run_id, *sums).where(*of_checkpoints, _storage.c.run_id.in_(run_ids))
        found = {run_id: money.sum_of(*halves) for run_id, *halves in tx.execute(counted.group_by(_storage.c.run_id))}
        kept = storage_metering.checkpoint_byte_seconds(tx, run_ids, since=since, until=until)
        for run_id in run_ids:
            if run_id not in altered and kept.get(run_id, 0) != found.get(run_id, 0):
                source = f"storage of {run_id}"
                yield _difference(Wrong.BYTES, source, None, kept.get(run_id, 0), found.get(run_id, 0))
        last = run_ids[-1]


def _charges_without_usage(ids: Sequence[int]) -> Select[Any]:
    joined = _entry.outerjoin(_usage, _usage.c.operation_id == _entry.c.operation_id)
    joined = joined.outerjoin(_storage, _storage.c.id == _entry.c.storage_usage_id)
    wanted = (_entry.c.kind == EntryKind.CHARGE, _usage.c.id.is_(None), _storage.c.id.is_(None))
    query = select(_entry.c.id, _entry.c.source).select_from(joined)
    return query.where(_entry.c.id.in_(ids), *wanted).order_by(_entry.c.id)


def _in_force(cards: Sequence[DatedCard], account_id: str, at: datetime) -> DatedCard | None:
    for whose in (account_id, None):
        held = [card for card in cards if card.account_id == whose and card.effective_at <= at]
        if held:
            return max(held, key=lambda card: (card.effective_at, card.id))
    return None


def _difference(wrong: Wrong, source: str, entry_id: int | None, expected: Any, found: Any) -> Difference:
    if wrong is Wrong.AMOUNT:
        expected, found = (money.plain(money.from_units(units)) for units in (expected, found))
    return Difference(wrong, source, entry_id, str(expected), str(found))
