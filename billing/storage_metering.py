"""Storage by the hour: what was kept in every hour that is over becomes storage usage, and is charged.

Byte-seconds count whole seconds of the clock, so that the hours of a span add up to `size x (last second - first)`.

What always holds: a run has one row per hour and kind of storage, and one charge for it (none where it is free), both
written in one transaction. Hours are metered in their order and the runs of an hour in theirs, so what there is of an
hour is all of it up to some run: a pass that was cut short is taken up there. An hour that was metered is never touched
again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import structlog
from sqlalchemy import BigInteger, Connection, Row, case, func, literal, or_, select, true, type_coerce, union, update
from sqlalchemy.dialects import postgresql, sqlite

from billing import cloud_events, ledger, money, rate_cards, rating
from billing.dimensions import Dimensions
from billing.ledger import EntryKind, NewEntry
from billing.rate_cards import DatedCard
from billing.usage_totals import HOUR, hour_of
from storage import billing_tables, rows, tables
from storage.database import Database
from storage.tables import Timestamp

log = structlog.get_logger()

GRACE = timedelta(minutes=5)
"""An hour is metered this long after its end: what was being saved or deleted in it is committed by then."""
PAGE_RUNS = 100
"""Runs of one transaction."""
CHECKPOINT, STATE = "checkpoint", "state"
BYTE_SECONDS_MAX = 2**63 - 1
"""Of a run and hour: 2.5 PB."""

_span = billing_tables.storage_span
_usage = billing_tables.storage_usage
_hour = billing_tables.storage_hour
_entry = billing_tables.ledger_entry
_snapshot = tables.snapshot
_SECOND_US = 10**6
_GB = 10**9


@dataclass(frozen=True)
class _Kept:
    """What a run kept in an hour."""

    kind: str
    byte_seconds: int
    whom: Dimensions
    base_model: str


def storage_source(storage_usage_id: int) -> str:
    """The source of the charge for a row of storage usage."""
    return f"storage:{storage_usage_id}"


def meter(database: Database, *, pass_s: float, page_runs: int = PAGE_RUNS) -> bool:
    """Meter the hours that are over, a page of runs per transaction.

    Args:
        pass_s: how long to go on, in seconds.
        page_runs: runs looked at in one go.

    Returns:
        Whether nothing is left.
    """
    deadline = time.monotonic() + pass_s
    while True:
        with database.read() as tx:
            hour = next_hour(tx)
            if hour is None or hour + HOUR + GRACE > database.now(tx):
                return True
            last: str | None = _last_metered(tx, hour)
        while last is not None:
            last = _meter_page(database, hour, last, page_runs)
            if last is not None and time.monotonic() >= deadline:
                return False
        _conclude(database, hour)
        if time.monotonic() >= deadline:
            return False


def next_hour(tx: Connection) -> datetime | None:
    """The oldest hour that is not metered; None as long as nothing was ever kept."""
    done = metered(tx)
    if done is not None:
        return done[1]
    firsts = (_span.c.since, _snapshot.c.created_at)
    moments = [tx.execute(select(func.min(first, type_=Timestamp))).scalar_one() for first in firsts]
    return min((hour_of(moment) for moment in moments if moment is not None), default=None)


def metered(tx: Connection) -> tuple[datetime, datetime] | None:
    """From when to when all hours are metered; None if none is."""
    first, last = tx.execute(select(func.min(_hour.c.hour, type_=Timestamp), func.max(_hour.c.hour))).one()
    return None if first is None else (first, last + HOUR)


def checkpoint_byte_seconds(
    tx: Connection, run_ids: Sequence[str], *, since: datetime, until: datetime
) -> Mapping[str, int]:
    """What these runs kept in checkpoints between two moments; those that kept nothing are left out."""
    start, end = literal(since, Timestamp), literal(until, Timestamp)
    last = case((or_(_span.c.until.is_(None), _span.c.until > end), end), else_=_span.c.until)
    first = case((_span.c.since < start, start), else_=_span.c.since)
    seconds = type_coerce(last, BigInteger) // _SECOND_US - type_coerce(first, BigInteger) // _SECOND_US
    # In two halves: 64 bits hold 2.5 PB for an hour, and SQLite would go on in floating point.
    halves = func.sum(_span.c.size_bytes // _GB * seconds), func.sum(_span.c.size_bytes % _GB * seconds)
    query = select(_span.c.run_id, *halves).where(
        _span.c.run_id.in_(run_ids), _span.c.since < end, or_(_span.c.until.is_(None), _span.c.until > start)
    )
    found = tx.execute(query.group_by(_span.c.run_id))
    return {run_id: int(high) * _GB + int(low) for run_id, high, low in found}


def price(kind: str, byte_seconds: int, dated: DatedCard) -> int:
    """What storage of an hour is charged, in `money.SCALE`-ths."""
    return money.to_units(rating.storage_charge(kind, byte_seconds, dated.card))


def _last_metered(tx: Connection, hour: datetime) -> str:
    """The last run of this hour that was metered; "" is none."""
    return tx.execute(select(func.max(_usage.c.run_id)).where(_usage.c.hour == hour)).scalar_one() or ""


def _meter_page(database: Database, hour: datetime, after: str, page_runs: int) -> str | None:
    """Meter the runs that follow; returns the last one, None if there were no more."""
    with database.read() as tx:  # what an hour was is over, so nothing need be locked while it is added up
        run_ids = _runs_after(tx, after, page_runs)
        kept = _kept(tx, hour, run_ids)
    if kept:
        with database.begin() as tx:
            _charge(tx, hour, kept, now=database.now(tx))
    return run_ids[-1] if run_ids else None


def _runs_after(tx: Connection, after: str, limit: int) -> Sequence[str]:
    """The next runs that may have kept something, in the database's order."""
    parts = [
        select(table.c.run_id).where(table.c.run_id > after, wanted).distinct().order_by(table.c.run_id).limit(limit)
        for table, wanted in ((_span, billing_tables.NOT_METERED), (_snapshot, true()))
    ]
    found = union(*(select(part.subquery().c.run_id) for part in parts)).subquery()
    return tx.execute(select(found.c.run_id).order_by(found.c.run_id).limit(limit)).scalars().all()


def _kept(tx: Connection, hour: datetime, run_ids: Sequence[str]) -> list[_Kept]:
    by_kind = {
        CHECKPOINT: checkpoint_byte_seconds(tx, run_ids, since=hour, until=hour + HOUR),
        STATE: _state_byte_seconds(tx, hour, run_ids),
    }
    whom = {row.run_id: row for row in tx.execute(_runs(run_ids))}
    return [
        _Kept(kind, byte_seconds, _dimensions(whom[run_id]), whom[run_id].base_model)
        for run_id in run_ids
        for kind in by_kind
        if (byte_seconds := by_kind[kind].get(run_id, 0)) > 0
    ]


def _state_byte_seconds(tx: Connection, hour: datetime, run_ids: Sequence[str]) -> dict[str, int]:
    """The snapshots of these runs as they are now, for as much of the hour as the run was there."""
    created, size = tables.run.c.created_at, func.sum(_snapshot.c.size_bytes)
    query = select(_snapshot.c.run_id, created, size).join(tables.run, tables.run.c.id == _snapshot.c.run_id)
    found = tx.execute(query.where(_snapshot.c.run_id.in_(run_ids)).group_by(_snapshot.c.run_id, created))
    end = int((hour + HOUR).timestamp())
    return {run_id: int(size) * (end - int(max(hour, since).timestamp())) for run_id, since, size in found}


def _runs(run_ids: Sequence[str]) -> Any:
    """Whom these runs' storage is charged to, as their sessions stand now."""
    run, session = tables.run.c, tables.session.c
    whom = (run.account_id, session.project_id, session.api_key_id, run.session_id, session.batch)
    query = select(run.id.label("run_id"), run.base_model, *whom)
    return query.join_from(tables.run, tables.session, session.id == run.session_id).where(run.id.in_(run_ids))


def _dimensions(row: Row[Any]) -> Dimensions:
    return Dimensions(**{name: row._mapping[name] for name in Dimensions.__dataclass_fields__})


def _charge(tx: Connection, hour: datetime, kept: Sequence[_Kept], *, now: datetime) -> None:
    """Write the rows that are not there yet, and their charges, at the prices in force when the hour began."""
    cards: dict[str, DatedCard] = {}
    entries, written = [], []
    for part in map(_as_rows_hold, kept):
        account_id = part.whom.account_id
        if account_id not in cards:
            cards[account_id] = rate_cards.in_force(tx, account_id, at=hour)
        try:
            units = price(part.kind, part.byte_seconds, cards[account_id])
        except money.AmountError as error:  # others' storage is metered all the same; `verify` shows this one
            log.error("storage_charge_too_large", run=part.whom.run_id, hour=hour.isoformat(), error=str(error))
            units = 0
        usage_id = _insert(tx, hour, part)
        if usage_id is not None:
            written.append(usage_id)
        if usage_id is not None and units:
            source, card_id = storage_source(usage_id), cards[account_id].id
            entry = NewEntry(
                EntryKind.CHARGE, source, part.whom, units, storage_usage_id=usage_id, rate_card_id=card_id
            )
            entries.append(entry)
    ledger.append(tx, entries, now=now)
    cloud_events.announce_storage(tx, written, now=now)


def _as_rows_hold(part: _Kept) -> _Kept:
    """The same with no more byte-seconds than a row holds: others' storage is metered all the same."""
    if part.byte_seconds <= BYTE_SECONDS_MAX:
        return part
    log.error("storage_too_large", run=part.whom.run_id, byte_seconds=part.byte_seconds)  # `verify` shows it
    return replace(part, byte_seconds=BYTE_SECONDS_MAX)


def _insert(tx: Connection, hour: datetime, part: _Kept) -> int | None:
    """The row's number; None if another pass has written it."""
    dialect = sqlite if tx.dialect.name == "sqlite" else postgresql
    values = {"hour": hour, "kind": part.kind, "byte_seconds": part.byte_seconds, "base_model": part.base_model}
    new = dialect.insert(_usage).values(**values, **part.whom.__dict__).on_conflict_do_nothing()
    return tx.execute(new.returning(_usage.c.id)).scalar_one_or_none()


def _conclude(database: Database, hour: datetime) -> None:
    """Note that an hour is metered, and which spans ended in it."""
    with database.begin() as tx:
        rows.insert_if_absent(tx, _hour, hour=hour)
        ended = (_span.c.until <= hour + HOUR, billing_tables.NOT_METERED)
        tx.execute(update(_span).where(*ended).values(metered=True))
