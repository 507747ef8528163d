"""Usage added up: by any dimensions, of anyone, in any range of time, in a time that does not grow with history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Row,
    Select,
    Table,
    case,
    func,
    literal,
    select,
    type_coerce,
    union_all,
)

from billing import money
from billing.usage import COUNTS
from storage import billing_tables, rows, tables
from storage.tables import Timestamp

HOUR = timedelta(hours=1)
BY_RUN = ("account_id", "run_id", "kind", "base_model", "device")

_record = billing_tables.usage_record
_rollup = billing_tables.usage_rollup
_entry = billing_tables.ledger_entry
_storage = billing_tables.storage_usage
_HOUR_US = HOUR // timedelta(microseconds=1)
_NONE_IS: dict[str, Any] = {"project_id": "", "api_key_id": 0, "batch": "", "run_id": ""}
_PLAIN = ("account_id", "session_id", "kind", "base_model", "device")
_NUMBERS = ("operations", *COUNTS)
_LARGE = ("charge", "byte_seconds")  # their sums may not fit in 64 bits

STORAGE_KINDS: Mapping[str, str] = {"checkpoint": "checkpoint_storage", "state": "state_storage"}
"""Kinds of stored bytes, and what they are called among kinds of operations."""


@dataclass(frozen=True)
class Scope:
    """Whose usage, and when; None is any.

    Attributes:
        batches: any of these.
        run_id, run_ids: a run or any of these, samples drawn from their weights included.
        kinds: any of these kinds of operations, or of storage (`STORAGE_KINDS`); without one of storage, its rows are
            not read.
        since, until: what finished from the one on and before the other; storage counts with the beginning of its hour.
    """

    account_id: str | None = None
    project_id: str | None = None
    api_key_id: int | None = None
    session_id: str | None = None
    batch: str | None = None
    batches: Sequence[str] | None = None
    run_id: str | None = None
    run_ids: Sequence[str] | None = None
    kinds: Sequence[str] | None = None
    base_model: str | None = None
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True)
class UsageTotal:
    """Usage added up; the dimensions that it was not asked by are None.

    Attributes:
        hour: its beginning.
        charge: in `money.SCALE`-ths.
        byte_seconds: of storage, which is no operation and has kinds of its own.
    """

    operations: int
    device_ns: int
    tokens_trained: int
    tokens_prefilled: int
    tokens_cached: int
    tokens_sampled: int
    charge: int
    byte_seconds: int = 0
    hour: datetime | None = None
    account_id: str | None = None
    project_id: str | None = None
    api_key_id: int | None = None
    session_id: str | None = None
    batch: str | None = None
    run_id: str | None = None
    kind: str | None = None
    base_model: str | None = None
    device: str | None = None


def totals(tx: Connection, scope: Scope | None = None, *, by: Sequence[str] = BY_RUN) -> Sequence[UsageTotal]:
    """Usage and what was charged for it, per combination of dimensions, in their order.

    It is read from rollups, from what is not rolled up yet and from hours of storage, in one statement, so it is exact
    whatever is committed or rolled up meanwhile. An hour that the scope begins or ends within is read from its usage
    records.

    Args:
        by: names of the dimensions of `UsageTotal`.
    """
    parts = union_all(*_parts(scope or Scope())).subquery()
    columns = [parts.c[name] for name in by]
    sums = [func.sum(parts.c[name]).label(name) for name in _NUMBERS]
    for name in _LARGE:
        high, low = money.sum_columns(parts.c[name])
        sums += [high.label(f"{name}_high"), low.label(f"{name}_low")]
    query = select(*columns, *sums).group_by(*columns).order_by(*columns)
    found = (_total(row, by) for row in tx.execute(query))
    return [total for total in found if total.operations or total.byte_seconds]


def charged(tx: Connection, scope: Scope) -> int:
    """What was charged for usage of this scope, in `money.SCALE`-ths."""
    return sum(total.charge for total in totals(tx, scope, by=()))


def hour_of(moment: datetime) -> datetime:
    """The beginning of the moment's hour."""
    moment = moment.astimezone(UTC)
    return moment.replace(minute=0, second=0, microsecond=0)


def _total(row: Row[*tuple[Any, ...]], by: Sequence[str]) -> UsageTotal:
    values: dict[str, Any] = {name: row._mapping[name] or None for name in by}
    values |= {name: int(row._mapping[name] or 0) for name in _NUMBERS}  # without any rows, sums are null
    values |= {name: money.sum_of(row._mapping[f"{name}_high"], row._mapping[f"{name}_low"]) for name in _LARGE}
    return UsageTotal(**values)


def _parts(scope: Scope) -> list[Select[Any]]:
    """Whole hours from rollups and what these lack, then the hours that the scope cuts from their records."""
    since, until = scope.since, scope.until
    first = None if since is None else _next_hour(since)
    last = None if until is None else hour_of(until)
    stored = _hours_of_storage(scope)
    if first is not None and last is not None and first >= last:
        return [_records(scope, _cut(scope, since, until)), *stored]
    hours = [] if first is None else [_rollup.c.hour >= first]
    hours += [] if last is None else [_rollup.c.hour < last]
    edges = [(since, first)] if since != first else []
    edges += [(last, until)] if until != last else []
    rolled_up = [_rollup.c[name] for name in (*_NUMBERS, "charge")]
    return [
        select(*_dimensions(_rollup, _rollup.c.hour), *rolled_up, literal(0).label("byte_seconds")).where(
            *_of(scope, _rollup), *_of_kinds(scope, _rollup), *hours
        ),
        *stored,
        _records(scope, [billing_tables.NOT_ROLLED_UP, *_finished_between(first, last)]),
        *(_records(scope, _cut(scope, *edge)) for edge in edges),
    ]


def _records(scope: Scope, wanted: Sequence[Any]) -> Select[Any]:
    finished = type_coerce(_record.c.finished_at, BigInteger)
    hour = type_coerce(finished - finished % _HOUR_US, Timestamp).label("hour")
    charge = select(_entry.c.amount).where(_entry.c.operation_id == _record.c.operation_id).scalar_subquery()
    counts = [_record.c[name] for name in COUNTS]
    columns = (*_dimensions(_record, hour), literal(1).label("operations"), *counts)
    large = (func.coalesce(charge, 0).label("charge"), literal(0).label("byte_seconds"))
    return select(*columns, *large).where(*_of(scope, _record), *_of_kinds(scope, _record), *wanted)


def _hours_of_storage(scope: Scope) -> list[Select[Any]]:
    """One query, or none where no kind of storage is wanted."""
    kinds = [kind for kind, name in STORAGE_KINDS.items() if scope.kinds is None or name in scope.kinds]
    if not kinds:
        return []
    charge = select(_entry.c.amount).where(_entry.c.storage_usage_id == _storage.c.id).scalar_subquery()
    kind = case(*((_storage.c.kind == kind, name) for kind, name in STORAGE_KINDS.items())).label("kind")
    plain = [_storage.c.account_id, _storage.c.session_id, kind, _storage.c.base_model, literal("").label("device")]
    numbers = [literal(0).label(name) for name in _NUMBERS]
    columns = (_storage.c.hour, *plain, *_or_none(_storage), *numbers)
    wanted: list[ColumnElement[bool]] = [] if len(kinds) == len(STORAGE_KINDS) else [_storage.c.kind.in_(kinds)]
    wanted += [] if scope.since is None else [_storage.c.hour >= scope.since]
    wanted += [] if scope.until is None else [_storage.c.hour < scope.until]
    query = select(*columns, func.coalesce(charge, 0).label("charge"), _storage.c.byte_seconds)
    return [query.where(*_of(scope, _storage), *wanted)]


def _dimensions(table: Table, hour: ColumnElement[Any]) -> list[ColumnElement[Any]]:
    return [hour, *(table.c[name] for name in _PLAIN), *_or_none(table)]


def _or_none(table: Table) -> list[ColumnElement[Any]]:
    return [func.coalesce(table.c[name], none).label(name) for name, none in _NONE_IS.items()]


def _of(scope: Scope, table: Table) -> list[ColumnElement[bool]]:
    names = ("project_id", "api_key_id", "session_id", "batch", "run_id", "base_model")
    wanted = [table.c[name] == value for name in names if (value := getattr(scope, name)) is not None]
    wanted += [] if scope.run_ids is None else [table.c.run_id.in_(scope.run_ids)]
    of_runs = scope.run_id is not None or scope.run_ids is not None
    if scope.account_id is not None:  # of runs only their own rows are read, not all of their account's
        account_id = rows.without_index(table.c.account_id) if of_runs else table.c.account_id
        wanted.append(account_id == scope.account_id)
    elif scope.since is not None and not of_runs:
        # indices of times begin with the account: with all of them named, what is older is not read
        wanted.append(table.c.account_id.in_(select(tables.account.c.id)))
    return wanted + ([] if scope.batches is None else [table.c.batch.in_(scope.batches)])


def _of_kinds(scope: Scope, table: Table) -> list[ColumnElement[bool]]:
    return [] if scope.kinds is None else [table.c.kind.in_(scope.kinds)]


def _cut(scope: Scope, since: datetime | None, until: datetime | None) -> list[ColumnElement[bool]]:
    """Less than two hours: the account's records of these are fewer than all of a run's."""
    wanted = [] if scope.account_id is None else [_record.c.account_id == scope.account_id]
    return [*wanted, *_finished_between(since, until)]


def _finished_between(since: datetime | None, until: datetime | None) -> list[ColumnElement[bool]]:
    wanted = [] if since is None else [_record.c.finished_at >= since]
    return wanted + ([] if until is None else [_record.c.finished_at < until])


def _next_hour(moment: datetime) -> datetime:
    """The first beginning of an hour that is not before the moment."""
    hour = hour_of(moment)
    return hour if hour == moment else hour + HOUR
