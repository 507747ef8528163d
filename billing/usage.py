"""Usage records: what one completed operation used, written once, in the transaction that completes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, func, select

from billing import money
from storage import billing_tables, tables

_table = billing_tables.usage_record
_entry = billing_tables.ledger_entry


@dataclass(frozen=True)
class Usage:
    """What an operation used.

    Attributes:
        device: e.g. `cpu` or `cuda:NVIDIA H100`.
        device_ns: its share of the device time of every engine step it was in, in nanoseconds.
        tokens_trained: of `forward` and `forward_backward`.
        tokens_prefilled, tokens_cached, tokens_sampled: of `sample`; cached ones were not computed again.
        attempt: which start of the operation this was; 1 is the first.
    """

    device: str
    device_ns: int
    attempt: int
    worker_id: str
    tokens_trained: int = 0
    tokens_prefilled: int = 0
    tokens_cached: int = 0
    tokens_sampled: int = 0


@dataclass(frozen=True)
class UsageTotal:
    """Usage of one account, run and kind on one kind of device, added up.

    Attributes:
        charge: in `money.SCALE`-ths.
    """

    account: str
    run_id: str | None
    kind: str
    base_model: str
    device: str
    operations: int
    device_ns: int
    tokens_trained: int
    tokens_prefilled: int
    tokens_cached: int
    tokens_sampled: int
    charge: int


@dataclass(frozen=True)
class UsageRow:
    """The usage record of an operation, and whom it is for; the other fields are as those of `Dimensions`."""

    usage: Usage
    operation_id: int
    account_id: str
    project_id: str | None
    api_key_id: int | None
    session_id: str
    batch: str | None
    run_id: str | None
    sampling_session_id: str | None
    kind: str
    base_model: str
    finished_at: datetime

    def values(self) -> dict[str, Any]:
        """The columns of the row."""
        values = dict(self.__dict__)
        return {**values.pop("usage").__dict__, **values}


def of_operations(tx: Connection, operation_ids: Sequence[int]) -> Mapping[int, Usage]:
    """What each of these operations used; those without a record, which are not completed, are left out."""
    names = [field.name for field in fields(Usage)]
    query = select(_table.c.operation_id, *(_table.c[name] for name in names))
    found = tx.execute(query.where(_table.c.operation_id.in_(operation_ids)))
    return {row.operation_id: Usage(**{name: row._mapping[name] for name in names}) for row in found}


def totals(
    tx: Connection,
    *,
    account_id: str | None = None,
    run_id: str | None = None,
    session_id: str | None = None,
    since: datetime | None = None,
) -> Sequence[UsageTotal]:
    """Usage per account, run, kind, base model and device, in that order.

    Args:
        run_id: only of this run, samples drawn from its weights included.
        since: only of operations finished from then on.
    """
    columns = (
        tables.account.c.name.label("account"),
        _table.c.run_id,
        _table.c.kind,
        _table.c.base_model,
        _table.c.device,
    )
    names = ("device_ns", "tokens_trained", "tokens_prefilled", "tokens_cached", "tokens_sampled")
    sums = [func.sum(_table.c[name]).label(name) for name in names]
    high, low = money.sum_columns(_entry.c.amount)
    query = (
        select(*columns, func.count().label("operations"), *sums, high.label("high"), low.label("low"))
        .outerjoin(_entry, _entry.c.operation_id == _table.c.operation_id)
        .join(tables.account, tables.account.c.id == _table.c.account_id)
        .group_by(*columns)
        .order_by(*columns)
    )
    filters = {"account_id": account_id, "run_id": run_id, "session_id": session_id}
    for name, value in filters.items():
        if value is not None:
            query = query.where(_table.c[name] == value)
    if since is not None:
        query = query.where(_table.c.finished_at >= since)
    rows = [dict(row._mapping) for row in tx.execute(query)]
    return [
        UsageTotal(
            charge=money.sum_of(row.pop("high"), row.pop("low")),
            **{**row, **{name: int(row[name]) for name in names}},
        )
        for row in rows
    ]
