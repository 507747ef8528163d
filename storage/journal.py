"""The journal: a row per primitive operation. It is the truth; messages only say that it has changed.

    (accepted) ──▶ queued ──start()/claim()──▶ running ──complete()──▶ completed
        │             ▲                          │  └──fail()────────▶ failed
        │             └─put_back(), release_claims()
        └──invalid, or a gap that timed out──▶ failed                        queued ──cancel()──▶ cancelled

A run's operations take effect in `seq` order: only the holder of the run's lease moves them, one transaction a batch.
Samples have no order: how workers claim them is in `claims.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    and_,
    exists,
    func,
    not_,
    null,
    or_,
    select,
    text,
    update,
)

from storage import ids, rows, suspects, tables, uploads
from storage.errors import RowNotFoundError
from storage.payloads import Stored
from storage.suspects import Cause


class Status(StrEnum):
    """Where an operation stands."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL = (Status.COMPLETED, Status.FAILED, Status.CANCELLED)
OPEN = (Status.QUEUED, Status.RUNNING)
NOBODY_KNOWS = 2**62
"""In place of a failure number: greater than any that an operation can have seen."""
IDS_PER_QUERY = 1000


@dataclass(frozen=True)
class Operation:
    """One row of the journal, without the bytes of payload and outcome.

    Attributes:
        seq: place in its run (from 0), or the client's number of a sample.
        payload, outcome: where their bytes are.
        loads_key: object with the weights that a `load_state` read or will read.
        failures_seen: failures of the run that had been recorded when this was accepted.
        failure_number: which failure of the run this is, or None.
        attempts: times it was started.
        suspect: a worker died with it in its step: it runs alone from now on.
        alone: whether the attempt that runs has no company.
        blame: deaths of workers while it ran alone (`suspects.py` reads it).
        expired: its outcome was kept long enough and is gone.
    """

    id: int
    request_id: str
    account_id: str
    run_id: str | None
    sampling_session_id: str | None
    seq: int
    kind: str
    base_model: str
    status: str
    payload: Stored
    outcome: Stored
    loads_key: str | None
    error: str | None
    error_category: str | None
    failures_seen: int
    failure_number: int | None
    num_sequences: int
    attempts: int
    suspect: bool
    alone: bool
    blame: int
    worker_id: str | None
    accepted_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    expired: bool

    @property
    def lost_gradients(self) -> bool:
        """Whether it failed and should have added gradients."""
        return self.status == Status.FAILED and self.kind in ("forward_backward", "gap")


@dataclass(frozen=True)
class Amount:
    """So many operations, and the bytes of their payloads together."""

    operations: int
    payload_bytes: int

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.operations + other.operations, self.payload_bytes + other.payload_bytes)

    def __neg__(self) -> Amount:
        return Amount(-self.operations, -self.payload_bytes)


@dataclass(frozen=True)
class Refusal:
    """Why an operation is accepted as failed: the words, and `user` or `server`."""

    error: str
    category: str


# ----------------------------------------------------------------------------------------------------------- accepting


def accept_training(
    tx: Connection,
    *,
    account_id: str,
    run_id: str,
    seq: int,
    kind: str,
    base_model: str,
    payload: Stored,
    now: datetime,
    refusal: Refusal | None = None,
    gradients: bool = False,
    loads_key: str | None = None,
) -> tuple[str, bool]:
    """Write down a training operation; one with a `refusal` is failed from the start, and its `seq` is consumed.

    Args:
        gradients: whether it would have added gradients: a failure that later `optim_step`s must know of.
        loads_key: object with the weights that a `load_state` reads; kept as long as the row is.

    Returns:
        The request id, and whether the row is new: the same `seq` again gives the first one's request id.
    """
    request_id = ids.training_request_id(run_id, seq)
    failures = tx.execute(select(tables.run.c.num_failures).where(tables.run.c.id == run_id)).scalar_one()
    new = rows.insert_if_absent(
        tx,
        tables.operation,
        request_id=request_id,
        account_id=account_id,
        run_id=run_id,
        seq=seq,
        kind=kind,
        base_model=base_model,
        failures_seen=failures,
        loads_key=loads_key,
        accepted_at=now,
        **_payload_values(payload),
        **_refusal_values(refusal, now),
    )
    if new:
        tx.execute(update(tables.run).where(tables.run.c.id == run_id).values(last_request_at=now))
    if new and loads_key is not None:
        uploads.keep(tx, loads_key)
    if new and refusal is not None and gradients:
        _number_failure(tx, run_id, request_id)
    return request_id, new


def accept_sample(
    tx: Connection,
    *,
    account_id: str,
    sampling_session_id: str,
    seq: int,
    kind: str,
    base_model: str,
    payload: Stored,
    num_sequences: int,
    now: datetime,
    refusal: Refusal | None = None,
) -> tuple[str, bool]:
    """Write down a sample; returns its request id and whether the row is new."""
    request_id = ids.sample_request_id(sampling_session_id, seq)
    new = rows.insert_if_absent(
        tx,
        tables.operation,
        request_id=request_id,
        account_id=account_id,
        sampling_session_id=sampling_session_id,
        seq=seq,
        kind=kind,
        base_model=base_model,
        num_sequences=num_sequences,
        accepted_at=now,
        **_payload_values(payload),
        **_refusal_values(refusal, now),
    )
    return request_id, new


def _payload_values(payload: Stored) -> dict[str, Any]:
    return {"payload": payload.inline, "payload_key": payload.key, "payload_bytes": payload.size_bytes}


def _refusal_values(refusal: Refusal | None, now: datetime) -> dict[str, Any]:
    if refusal is None:
        return {"status": Status.QUEUED}
    return {
        "status": Status.FAILED,
        "error": refusal.error,
        "error_category": refusal.category,
        "finished_at": now,
    }


def _number_failure(tx: Connection, run_id: str, request_id: str) -> int:
    run, operation = tables.run, tables.operation
    counted = update(run).where(run.c.id == run_id).values(num_failures=run.c.num_failures + 1)
    number: int = tx.execute(counted.returning(run.c.num_failures)).scalar_one()
    tx.execute(update(operation).where(operation.c.request_id == request_id).values(failure_number=number))
    return number


# ------------------------------------------------------------------------------------------------------------- reading


def find_operation(tx: Connection, request_id: str, *, account_id: str | None = None) -> Operation | None:
    """The operation with this request id, of this account if one is named."""
    query = _operations().where(tables.operation.c.request_id == request_id)
    if account_id is not None:
        query = query.where(tables.operation.c.account_id == account_id)
    row = tx.execute(query).one_or_none()
    return None if row is None else _from_row(row._mapping)


def get_operation(tx: Connection, request_id: str, *, account_id: str | None = None) -> Operation:
    """The operation with this request id.

    Raises:
        RowNotFoundError: there is none.
    """
    operation = find_operation(tx, request_id, account_id=account_id)
    if operation is None:
        raise RowNotFoundError("operation", request_id)
    return operation


def operations_of(tx: Connection, operation_ids: Sequence[int]) -> Sequence[Operation]:
    """The operations with these ids, those accepted first before others."""
    table = tables.operation.c
    rows = tx.execute(_operations().where(table.id.in_(operation_ids)).order_by(table.id))
    return [_from_row(row._mapping) for row in rows]


def list_operations(tx: Connection, run_id: str, *, limit: int, after_seq: int = -1) -> Sequence[Operation]:
    """A run's operations after `after_seq`, in order."""
    table = tables.operation.c
    query = _operations().where(table.run_id == run_id, table.seq > after_seq).order_by(table.seq).limit(limit)
    return [_from_row(row._mapping) for row in tx.execute(query)]


def page_of_run(tx: Connection, run_id: str, *, limit: int, after_seq: int = -1) -> Sequence[Operation]:
    """The same without a byte of payloads and outcomes, for those who only look."""
    table, left_out = tables.operation.c, ("payload", "outcome")
    kept = (column for column in _columns() if column.name not in left_out)
    query = select(*kept, *(null().label(name) for name in left_out))
    query = query.where(table.run_id == run_id, table.seq > after_seq).order_by(table.seq).limit(limit)
    return [_from_row(row._mapping) for row in tx.execute(query)]


def num_ahead(tx: Connection, run_ids: Sequence[str]) -> Mapping[str, int]:
    """How many operations of each of these runs lie beyond its committed state; runs without any are left out."""
    run, operation = tables.run.c, tables.operation.c
    ahead = and_(operation.run_id == run.id, operation.seq > run.state_seq)
    query = select(run.id, func.count()).join(tables.operation, ahead).where(run.id.in_(run_ids)).group_by(run.id)
    return {row[0]: row[1] for row in tx.execute(query)}


def next_in_order(tx: Connection, run_id: str, *, after_seq: int, limit: int) -> Sequence[Operation]:
    """The operations that follow `after_seq` without a gap, failed ones included; at most `limit`."""
    following = list_operations(tx, run_id, limit=limit, after_seq=after_seq)
    return [op for place, op in enumerate(following, start=after_seq + 1) if op.seq == place]


def is_overtaken(tx: Connection, run_id: str, seq: int) -> bool:
    """Whether a later operation of the run waits for execution."""
    table = tables.operation.c
    waits = select(table.id).where(table.run_id == run_id, table.seq > seq, table.status.in_(OPEN))
    return tx.execute(waits.limit(1)).first() is not None


def finished_among(tx: Connection, request_ids: Iterable[str]) -> Sequence[str]:
    """Those of these request ids whose operation has an outcome."""
    table = tables.operation.c
    asked, finished = list(request_ids), list[str]()
    for first in range(0, len(asked), IDS_PER_QUERY):  # databases limit the parameters of a query
        some = asked[first : first + IDS_PER_QUERY]
        query = select(table.request_id).where(table.request_id.in_(some), table.status.in_(FINAL))
        finished.extend(tx.execute(query).scalars())
    return finished


def failed_gradients(tx: Connection, run_id: str, *, before_seq: int) -> Sequence[tuple[int, int]]:
    """(`seq`, failure number) of the failed `forward_backward`s since the last `optim_step` before `before_seq`.

    One that was refused, and whose outcome nobody has fetched yet, has the number `NOBODY_KNOWS`.
    """
    table = tables.operation.c
    last_step = (
        select(func.coalesce(func.max(table.seq), -1))
        .where(table.run_id == run_id, table.kind == "optim_step", table.seq < before_seq, table.attempts > 0)
        .scalar_subquery()
    )
    unknown = and_(table.kind == "forward_backward", table.status == Status.FAILED)
    query = select(table.seq, func.coalesce(table.failure_number, NOBODY_KNOWS)).where(
        table.run_id == run_id,
        or_(table.failure_number.is_not(None), unknown),
        table.seq > last_step,
        table.seq < before_seq,
    )
    return [(seq, number) for seq, number in tx.execute(query.order_by(table.seq))]


def note_failure_known(tx: Connection, operation: Operation) -> None:
    """The client is about to learn that a `forward_backward` was refused: steps accepted from now on know of it."""
    refused = operation.kind == "forward_backward" and operation.status == Status.FAILED
    if refused and operation.run_id is not None and operation.failure_number is None:
        _number_failure(tx, operation.run_id, operation.request_id)


def open_by_account(tx: Connection) -> Mapping[str, Amount]:
    """Operations without an outcome yet, by account; read from an index of just these."""
    table = tables.operation.c
    columns = (table.account_id, func.count(), func.sum(table.payload_bytes))
    query = select(*columns).where(tables.OPEN).group_by(table.account_id)
    return {account_id: Amount(number, int(size)) for account_id, number, size in tx.execute(query)}


# ----------------------------------------------------------------------------------------------------------- executing


def start(tx: Connection, operation_ids: Sequence[int], *, worker_id: str, now: datetime, alone: bool = False) -> None:
    """Write down that a worker begins with these training operations, before it does: one attempt more each.

    Should the worker die, this is what its death is held against. Operations of runs whose lease it has lost meanwhile
    are another's already, and stay as they are.

    Args:
        alone: it executes nothing else at the same time.
    """
    table, run = tables.operation, tables.run
    held = exists().where(run.c.id == table.c.run_id, run.c.lease_worker == worker_id)
    tx.execute(
        update(table)
        .where(table.c.id.in_(operation_ids), table.c.status.in_(OPEN), held)
        .values(status=Status.RUNNING, attempts=table.c.attempts + 1, worker_id=worker_id, started_at=now, alone=alone)
    )


def put_back(
    tx: Connection,
    *,
    cause: Cause,
    worker_id: str | None = None,
    run_id: str | None = None,
    but_of: str | None = None,
) -> int:
    """Queue training operations again whose execution ended without an outcome.

    Args:
        cause: how it ended; what that is held against is in `suspects.py`.
        worker_id, run_id: only those that this worker began; only those of this run.
        but_of: none that this worker began.

    Returns:
        How many there were.
    """
    table, run = tables.operation, tables.run
    begun = update(table).where(table.c.status == Status.RUNNING, table.c.run_id.is_not(None))
    if worker_id is not None:
        begun = begun.where(table.c.worker_id == worker_id)
    if run_id is not None:
        state_seq = select(run.c.state_seq).where(run.c.id == run_id).scalar_subquery()
        begun = begun.where(table.c.run_id == run_id, table.c.seq > state_seq)
    if but_of is not None:
        begun = begun.where(table.c.worker_id != but_of)
    return tx.execute(begun.values(status=Status.QUEUED, **suspects.values_after_death(cause))).rowcount


def complete(tx: Connection, operation: Operation, outcome: Stored, *, worker_id: str, now: datetime) -> None:
    """Record the outcome of a training operation; the caller has checked the lease in the same transaction."""
    changed = tx.execute(
        _open(operation.id).values(status=Status.COMPLETED, **_outcome_values(outcome, worker_id, now))
    )
    assert changed.rowcount == 1, f"{operation.request_id} had an outcome already"


def fail(tx: Connection, operation: Operation, refusal: Refusal, *, worker_id: str | None, now: datetime) -> None:
    """Record that an operation failed; the failure of one that adds gradients is numbered."""
    changed = tx.execute(
        _open(operation.id).values(
            status=Status.FAILED,
            error=refusal.error,
            error_category=refusal.category,
            worker_id=worker_id,
            finished_at=now,
        )
    )
    assert changed.rowcount == 1, f"{operation.request_id} had an outcome already"
    if operation.kind == "forward_backward":
        assert operation.run_id is not None
        _number_failure(tx, operation.run_id, operation.request_id)


def record_load(tx: Connection, operation: Operation, loads_key: str) -> None:
    """Note which immutable object a `load_state` has read, so that a replay reads the same."""
    table = tables.operation
    tx.execute(update(table).where(table.c.id == operation.id).values(loads_key=loads_key))
    uploads.keep(tx, loads_key)


def cancel(tx: Connection, request_id: str, *, account_id: str, now: datetime) -> bool:
    """Cancel a sample that has no outcome; returns whether it was cancelled by this call."""
    table = tables.operation
    changed = tx.execute(
        update(table)
        .where(
            table.c.request_id == request_id,
            table.c.account_id == account_id,
            table.c.sampling_session_id.is_not(None),
            table.c.status.in_(OPEN),
        )
        .values(status=Status.CANCELLED, error="the sample was cancelled", error_category="user", finished_at=now)
    )
    return changed.rowcount == 1


def _open(operation_id: int) -> Any:
    table = tables.operation
    return update(table).where(table.c.id == operation_id, table.c.status.in_(OPEN))


def _outcome_values(outcome: Stored, worker_id: str, now: datetime) -> dict[str, Any]:
    return {
        "outcome": outcome.inline,
        "outcome_key": outcome.key,
        "outcome_bytes": outcome.size_bytes,
        "worker_id": worker_id,
        "finished_at": now,
        "claim_expires_at": None,
    }


# ---------------------------------------------------------------------------------------------------- stalled and gaps


@dataclass(frozen=True)
class StalledRun:
    """A run whose next operation has waited too long.

    Attributes:
        held: whether a worker holds its lease; that worker may be busy, or may have missed its message.
    """

    id: str
    state_seq: int
    lease_epoch: int
    held: bool


def stalled_runs(tx: Connection, *, now: datetime, accepted_before: datetime, limit: int) -> Sequence[StalledRun]:
    """Runs whose next operation waits since `accepted_before`: nobody holds their lease, or the holder has not begun.

    Those that have waited longest come first.
    """
    run, operation = tables.run, tables.operation
    held = and_(run.c.lease_worker.is_not(None), run.c.lease_expires_at >= now)
    query = (
        select(run.c.id, run.c.state_seq, run.c.lease_epoch, held.label("held"))
        .join(operation, and_(operation.c.run_id == run.c.id, operation.c.seq == run.c.state_seq + 1))
        .where(operation.c.accepted_at < accepted_before, or_(not_(held), operation.c.status != Status.RUNNING))
        .where(run.c.id.in_(select(operation.c.run_id).where(operation.c.status.in_(OPEN)).distinct()))
        .order_by(operation.c.id)
        .limit(limit)
    )
    return [StalledRun(row.id, row.state_seq, row.lease_epoch, bool(row.held)) for row in tx.execute(query)]


def gaps(tx: Connection, *, accepted_before: datetime, limit: int) -> Sequence[tuple[str, int, int]]:
    """(run, first missing `seq`, next `seq` that is there) where later operations wait since `accepted_before`.

    Only runs that have such an operation are looked at, and of those what lies between its state and that operation:
    a place is missing if there are fewer rows than numbers.
    """
    run, operation = tables.run, tables.operation
    waiting = (operation.c.status == Status.QUEUED) & (operation.c.accepted_at < accepted_before)
    last = (
        select(operation.c.run_id, func.max(operation.c.seq).label("seq"))
        .where(waiting, operation.c.run_id.is_not(None))
        .group_by(operation.c.run_id)
        .subquery()
    )
    num_rows = (
        select(func.count())
        .where(operation.c.run_id == run.c.id, operation.c.seq > run.c.state_seq, operation.c.seq <= last.c.seq)
        .scalar_subquery()
    )
    query = (
        select(run.c.id)
        .join(last, last.c.run_id == run.c.id)
        .where(num_rows < last.c.seq - run.c.state_seq)
        .limit(limit)
    )
    found: list[tuple[str, int, int]] = []
    for run_id in tx.execute(query).scalars().all():
        first = first_missing(tx, run_id)
        if first is None:
            continue  # it arrived meanwhile
        after = select(func.min(operation.c.seq)).where(operation.c.run_id == run_id, operation.c.seq > first, waiting)
        present = tx.execute(after).scalar_one()
        if present is not None:
            found.append((run_id, first, present))
    return found


def close_gap(tx: Connection, run_id: str, seq: int, *, error: str, now: datetime) -> bool:
    """Fill the place of a `seq` that never arrived with a failed row; returns whether it was still empty."""
    run = tx.execute(select(tables.run.c.account_id, tables.run.c.base_model).where(tables.run.c.id == run_id)).one()
    _, new = accept_training(
        tx,
        account_id=run.account_id,
        run_id=run_id,
        seq=seq,
        kind="gap",
        base_model=run.base_model,
        payload=Stored(),
        now=now,
        refusal=Refusal(error, "user"),
        gradients=True,
    )
    return new


def first_missing(tx: Connection, run_id: str, *, up_to: int | None = None) -> int | None:
    """The `seq` a run waits for while later ones are there, or None.

    Args:
        up_to: a `seq` that is there; only those before it are looked at. None looks at all.
    """
    table, following = tables.operation, tables.operation.alias("following")
    state_seq: int = tx.execute(select(tables.run.c.state_seq).where(tables.run.c.id == run_id)).scalar_one()
    ahead = and_(table.c.run_id == run_id, table.c.seq > state_seq)
    if up_to is not None:
        ahead = and_(ahead, table.c.seq <= up_to)
    present, last = tx.execute(select(func.count(), func.max(table.c.seq)).where(ahead)).one()
    if last is None or present == last - state_seq:
        return None
    if tx.execute(select(table.c.id).where(ahead, table.c.seq == state_seq + 1)).one_or_none() is None:
        return state_seq + 1
    next_is_there = exists().where(following.c.run_id == run_id, following.c.seq == table.c.seq + 1)
    before_gap = select(table.c.seq).where(ahead, ~next_is_there).order_by(table.c.seq).limit(1)
    last_present: int = tx.execute(before_gap).scalar_one()
    return last_present + 1


# -------------------------------------------------------------------------------------------------------------- ageing


@dataclass(frozen=True)
class Expired:
    """What `expire_outcomes` forgot.

    Attributes:
        outcomes: how many operations.
        object_keys: their payloads and outcomes, which nothing needs any more.
        loads_keys: weights that they had loaded; others may still need those.
    """

    outcomes: int
    object_keys: Sequence[str]
    loads_keys: Sequence[str]


def outcomes_to_expire(tx: Connection, *, finished_before: datetime, limit: int) -> Sequence[int]:
    """Ids of the operations whose outcomes were kept long enough, the oldest first.

    Payloads and outcomes of a run's replay tail stay: they lie after its second-newest snapshot.
    """
    table = tables.operation
    snapshots = tables.snapshot.c
    covered = (
        select(snapshots.seq)
        .where(snapshots.run_id == table.c.run_id)
        .order_by(snapshots.seq.desc())
        .limit(1)
        .offset(1)
    )
    query = (
        select(table.c.id)
        .where(table.c.finished_at < finished_before, text("NOT operation.expired"))  # the partial index's words
        .where(or_(table.c.run_id.is_(None), table.c.seq <= covered.correlate(table).scalar_subquery()))
        .order_by(table.c.finished_at)
        .limit(limit)
    )
    return tx.execute(query).scalars().all()


def expire_outcomes(tx: Connection, operation_ids: Sequence[int]) -> Expired:
    """Forget the outcomes of operations that `outcomes_to_expire` found, unless another has done so meanwhile."""
    table = tables.operation
    query = (
        select(table.c.id, table.c.payload_key, table.c.outcome_key, table.c.loads_key)
        .where(table.c.id.in_(operation_ids), table.c.expired.is_(False))
        .with_for_update(skip_locked=True)
    )
    rows = tx.execute(query).all()
    tx.execute(
        update(table)
        .where(table.c.id.in_([row.id for row in rows]))
        .values(expired=True, payload=None, payload_key=None, outcome=None, outcome_key=None)
    )
    return Expired(
        outcomes=len(rows),
        object_keys=[key for row in rows for key in (row.payload_key, row.outcome_key) if key is not None],
        loads_keys=[row.loads_key for row in rows if row.loads_key is not None],
    )


def _operations() -> Select[Any]:
    return select(*_columns())


def _columns() -> Sequence[ColumnElement[Any]]:
    return [column for column in tables.operation.c if column.name != "claim_expires_at"]


def _from_row(row: Mapping[Any, Any]) -> Operation:
    values = dict(row)
    for name in ("payload", "outcome"):
        values[name] = Stored(values[name], values.pop(f"{name}_key"), values.pop(f"{name}_bytes"))
    return Operation(**values)
