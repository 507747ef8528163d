"""Usage records: what one completed operation used, written once, in the transaction that completes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, select

from storage import billing_tables

_table = billing_tables.usage_record

COUNTS = ("device_ns", "tokens_trained", "tokens_prefilled", "tokens_cached", "tokens_sampled")
"""What is counted of an operation: nanoseconds and tokens."""


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
