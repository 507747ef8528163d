"""Usage added up: by any dimensions, of anyone, in any range of time, in a time that does not grow with history."""

from __future__ import annotations

from collections.abc import Sequence
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
    func,
    literal,
    select,
    type_coerce,
    union_all,
)

from billing import money
from billing.usage import COUNTS
from storage import billing_tables
from storage.tables import Timestamp

HOUR = timedelta(hours=1)
BY_RUN = ("account_id", "run_id", "kind", "base_model", "device")

_record = billing_tables.usage_record
_rollup = billing_tables.usage_rollup
_entry = billing_tables.ledger_entry
_HOUR_US = HOUR // timedelta(microseconds=1)
_NONE_IS: dict[str, Any] = {"project_id": "", "api_key_id": 0, "batch": "", "run_id": ""}
_PLAIN = ("account_id", "session_id", "kind", "base_model", "device")
_NUMBERS = ("operations", *COUNTS)


@dataclass(frozen=True)
class Scope:
    """Whose usage, and when; None is any.

    Attributes:
        run_id: a run, samples drawn from its weights included.
        since, until: what finished from the one on and before the other.
    """

    account_id: str | None = None
    project_id: str | None = None
    api_key_id: int | None = None
    session_id: str | None = None
    batch: str | None = None
    run_id: str | None = None
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True)
class UsageTotal:
    """Usage added up; the dimensions that it was not asked by are None.

    Attributes:
        hour: its beginning.
        charge: in `money.SCALE`-ths.
    """

    operations: int
    device_ns: int
    tokens_trained: int
    tokens_prefilled: int
    tokens_cached: int
    tokens_sampled: int
    charge: int
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

    It is read from rollups and from what is not rolled up yet, in one statement, so it is exact whatever is committed
    or rolled up meanwhile. An hour that the scope begins or ends within is read from its usage records.

    Args:
        by: names of the dimensions of `UsageTotal`.
    """
    parts = union_all(*_parts(scope or Scope())).subquery()
    columns = [parts.c[name] for name in by]
    sums = [func.sum(parts.c[name]).label(name) for name in _NUMBERS]
    high, low = money.sum_columns(parts.c.charge)
    query = select(*columns, *sums, high.label("high"), low.label("low")).group_by(*columns).order_by(*columns)
    return [_total(row, by) for row in tx.execute(query) if row.operations]


def charged(tx: Connection, scope: Scope) -> int:
    """What was charged for usage of this scope, in `money.SCALE`-ths."""
    return sum(total.charge for total in totals(tx, scope, by=()))


def hour_of(moment: datetime) -> datetime:
    """The beginning of the moment's hour."""
    moment = moment.astimezone(UTC)
    return moment.replace(minute=0, second=0, microsecond=0)


def _total(row: Row[*tuple[Any, ...]], by: Sequence[str]) -> UsageTotal:
    values: dict[str, Any] = {name: row._mapping[name] or None for name in by}
    values |= {name: int(row._mapping[name]) for name in _NUMBERS}
    return UsageTotal(charge=money.sum_of(row.high, row.low), **values)


def _parts(scope: Scope) -> list[Select[Any]]:
    """Whole hours from rollups and what these lack, then the hours that the scope cuts from their records."""
    since, until = scope.since, scope.until
    first = None if since is None else _next_hour(since)
    last = None if until is None else hour_of(until)
    if first is not None and last is not None and first >= last:
        return [_records(scope, _finished_between(since, until))]
    hours = [] if first is None else [_rollup.c.hour >= first]
    hours += [] if last is None else [_rollup.c.hour < last]
    edges = [(since, first)] if since != first else []
    edges += [(last, until)] if until != last else []
    return [
        select(*_dimensions(_rollup, _rollup.c.hour), *(_rollup.c[name] for name in (*_NUMBERS, "charge"))).where(
            *_of(scope, _rollup), *hours
        ),
        _records(scope, [billing_tables.NOT_ROLLED_UP, *_finished_between(first, last)]),
        *(_records(scope, _finished_between(*edge)) for edge in edges),
    ]


def _records(scope: Scope, wanted: Sequence[Any]) -> Select[Any]:
    finished = type_coerce(_record.c.finished_at, BigInteger)
    hour = type_coerce(finished - finished % _HOUR_US, Timestamp).label("hour")
    charge = select(_entry.c.amount).where(_entry.c.operation_id == _record.c.operation_id).scalar_subquery()
    counts = [_record.c[name] for name in COUNTS]
    columns = (*_dimensions(_record, hour), literal(1).label("operations"), *counts)
    return select(*columns, func.coalesce(charge, 0).label("charge")).where(*_of(scope, _record), *wanted)


def _dimensions(table: Table, hour: ColumnElement[Any]) -> list[ColumnElement[Any]]:
    nullable = [func.coalesce(table.c[name], none).label(name) for name, none in _NONE_IS.items()]
    return [hour, *(table.c[name] for name in _PLAIN), *nullable]


def _of(scope: Scope, table: Table) -> list[ColumnElement[bool]]:
    names = ("account_id", "project_id", "api_key_id", "session_id", "batch", "run_id")
    return [table.c[name] == value for name in names if (value := getattr(scope, name)) is not None]


def _finished_between(since: datetime | None, until: datetime | None) -> list[ColumnElement[bool]]:
    wanted = [] if since is None else [_record.c.finished_at >= since]
    return wanted + ([] if until is None else [_record.c.finished_at < until])


def _next_hour(moment: datetime) -> datetime:
    """The first beginning of an hour that is not before the moment."""
    hour = hour_of(moment)
    return hour if hour == moment else hour + HOUR
