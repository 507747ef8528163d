"""What holds after every step of every history, whatever has happened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, select

from storage import billing_tables, snapshots, tables
from storage.open import Storage
from storage.payloads import Stored

FINAL = ("completed", "failed", "cancelled")


@dataclass
class Book:
    """What has been seen, and may never change.

    Attributes:
        accepted: request ids that were returned, with the bytes of their payloads.
        outcomes: status, error and bytes of every outcome seen.
    """

    accepted: dict[str, bytes] = field(default_factory=dict)
    outcomes: dict[str, tuple[str, str | None, bytes]] = field(default_factory=dict)


def check(storage: Storage, book: Book) -> None:
    """Everything that holds at any time."""
    with storage.database.read() as tx:
        operations = tx.execute(select(tables.operation).order_by(tables.operation.c.id)).all()
        runs = tx.execute(select(tables.run)).all()
        _every_accepted_operation_is_there_once(operations, book)
        for run in runs:
            of_run = sorted((row for row in operations if row.run_id == run.id), key=lambda row: row.seq)
            _takes_effect_in_order(run, of_run)
            _failures_are_numbered(run, of_run)
            _can_be_replayed(tx, storage, run, of_run)
        _completed_operations_are_billed_once(tx, operations)
        _what_is_named_is_there(tx, storage, operations)
    _outcomes_never_change(storage, operations, book)


def _every_accepted_operation_is_there_once(operations: Sequence[Row[Any]], book: Book) -> None:
    present = [row.request_id for row in operations]
    assert len(present) == len(set(present))
    assert set(book.accepted) <= set(present), "an accepted operation is lost"
    places = [(row.run_id, row.sampling_session_id, row.seq) for row in operations]
    assert len(places) == len(set(places)), "a seq was taken twice"


def _takes_effect_in_order(run: Row[Any], operations: Sequence[Row[Any]]) -> None:
    """What is committed is a prefix without a gap, and nothing beyond it has taken effect."""
    committed = [row for row in operations if row.seq <= run.state_seq]
    assert [row.seq for row in committed] == list(range(run.state_seq + 1)), "a gap was passed over"
    assert all(row.status in ("completed", "failed") for row in committed)
    assert all(row.status != "completed" for row in operations if row.seq > run.state_seq)


def _failures_are_numbered(run: Row[Any], operations: Sequence[Row[Any]]) -> None:
    numbers = sorted(row.failure_number for row in operations if row.failure_number is not None)
    assert numbers == list(range(1, run.num_failures + 1))
    assert all(row.failures_seen <= run.num_failures for row in operations)


def _can_be_replayed(tx: Connection, storage: Storage, run: Row[Any], operations: Sequence[Row[Any]]) -> None:
    """From the second-newest snapshot, so that the newest may be damaged."""
    written = snapshots.newest_first(tx, run.id)
    assert len(written) <= snapshots.KEPT
    base = written[1].seq if len(written) > 1 else -1
    for row in operations:
        if base < row.seq <= run.state_seq and row.status == "completed":
            assert not row.expired, f"seq {row.seq} is needed from snapshot {base}"
            assert _bytes(storage, row.payload, row.payload_key)


def _completed_operations_are_billed_once(tx: Connection, operations: Sequence[Row[Any]]) -> None:
    billed = sorted(tx.execute(select(billing_tables.usage_record.c.operation_id)).scalars())
    assert billed == [row.id for row in operations if row.status == "completed"]


def _what_is_named_is_there(tx: Connection, storage: Storage, operations: Sequence[Row[Any]]) -> None:
    row = tables.stored_object.c
    referenced = set(tx.execute(select(row.key).where(row.state == "referenced")).scalars())
    named = named_keys(tx, operations)
    assert named == referenced
    assert all(storage.objects.exists(key) for key in named), "a row names an object that is gone"


def named_keys(tx: Connection, operations: Sequence[Row[Any]]) -> set[str]:
    """Every object that a row needs."""
    of_operations = {key for row in operations for key in (row.payload_key, row.outcome_key) if key is not None}
    of_states = tx.execute(select(tables.snapshot.c.object_key).union(select(tables.checkpoint.c.object_key)))
    return of_operations | set(of_states.scalars())


def _outcomes_never_change(storage: Storage, operations: Sequence[Row[Any]], book: Book) -> None:
    for row in operations:
        before = book.outcomes.get(row.request_id)
        if row.expired:
            assert before is not None
            assert (row.status, row.error) == before[:2]
        elif row.status in FINAL:
            now = (row.status, row.error, _bytes(storage, row.outcome, row.outcome_key))
            assert book.outcomes.setdefault(row.request_id, now) == now, "an outcome has changed"
        else:
            assert before is None, "an outcome is gone"
        if not row.expired and row.request_id in book.accepted and row.kind != "gap":
            assert _bytes(storage, row.payload, row.payload_key) == book.accepted[row.request_id]


def _bytes(storage: Storage, inline: bytes | None, key: str | None) -> bytes:
    return storage.payloads.get(Stored(inline=inline, key=key))


def check_swept(storage: Storage) -> None:
    """After a full sweep nothing lies in the store that no row needs, and every row of an object stands for one."""
    with storage.database.read() as tx:
        operations = tx.execute(select(tables.operation)).all()
        named = named_keys(tx, operations)
        known = set(tx.execute(select(tables.stored_object.c.key)).scalars())
    assert {info.key for info in storage.objects.list()} == named == known
