"""Lease → snapshot → tail, everything that a replay needs: `state(seq) = snapshot(s) + replay of s+1 … seq`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import structlog

from jobs import operations
from jobs.operations import CreateModel, ForwardBackward, Kind, LoadState, LoraConfig, OptimStep, Outcome
from storage import failpoints, journal, leases, runs, snapshots
from storage.errors import DamagedObjectError, ObjectNotFoundError
from storage.failpoints import Point
from storage.journal import Operation, Status
from storage.leases import Lease
from storage.open import Storage
from storage.runs import Run
from storage.snapshots import DamagedSnapshotError, Snapshot
from worker.engine.errors import EngineError
from worker.engine.run_state import RunState
from worker.errors import ModelUnavailableError, NoStateError
from worker.residency import BaseModels, ResidentModel

log = structlog.get_logger()

PAGE = 200
MAKES_STATE = (Kind.CREATE_MODEL, Kind.LOAD_STATE)
"""What was in the state before does not matter after one of these."""
COMPUTED_AGAIN = (Kind.FORWARD_BACKWARD, Kind.OPTIM_STEP)


@dataclass(frozen=True, eq=False)
class TailOperation:
    """An operation to be replayed.

    Attributes:
        body: None for a failed `optim_step` that cleared the gradients.
        recorded: the outcome that is on record; None if it cannot be read any more.
    """

    operation: Operation
    body: ForwardBackward | OptimStep | None
    recorded: Outcome | None


@dataclass(frozen=True, eq=False)
class Takeover:
    """Everything a replay needs, fetched.

    Attributes:
        snapshot_seq: of the snapshot that was good; -1 if there was none.
        state: that of the snapshot, or of the last `create_model` or `load_state` after it.
        tail: what changed the state since, in `seq` order.
        damaged: snapshots (`seq`s) that could not be used.
    """

    run: Run
    lease: Lease
    model: ResidentModel | None = None
    model_error: str | None = None
    state: RunState | None = None
    snapshot_seq: int = -1
    tail: Sequence[TailOperation] = ()
    damaged: Sequence[int] = field(default=())
    gradients_failed: bool = False


def acquire(storage: Storage, run_id: str, *, worker_id: str, lease_s: float) -> tuple[Run, Lease]:
    """Take a run's lease.

    Raises:
        LeaseLostError: another worker holds it.
    """
    failpoints.reach(Point.LEASE_BEGUN)
    with storage.database.begin() as tx:
        now = storage.database.now(tx)
        expires_at = storage.database.after(tx, lease_s)
        lease = leases.acquire(tx, run_id, worker_id=worker_id, now=now, expires_at=expires_at)
        run = runs.get_run(tx, run_id)
    failpoints.reach(Point.LEASE_TAKEN)
    return run, lease


def give_up(storage: Storage, lease: Lease) -> None:
    """Let another worker try."""
    with storage.database.begin() as tx:
        leases.release(tx, lease)


def without_state(run: Run, lease: Lease, *, reason: str) -> Takeover:
    """A takeover that has failed too often: the run's operations are to fail with these words, instead of waiting."""
    return Takeover(run, lease, model_error=reason)


def fetch(storage: Storage, models: BaseModels, run: Run, lease: Lease, *, in_use: Collection[str]) -> Takeover:
    """Load base model, newest good snapshot and tail; slow, and not for the engine's thread.

    Raises:
        NoStateError: neither a snapshot nor the journal gives the state back.
        ModelUnavailableError: memory or room on the disk is wanting for the base model; another worker may have it.
        StorageError: the store does not answer; trying again may help.
    """
    try:
        model = models.get(run.base_model, in_use=in_use)
    except ModelUnavailableError as error:
        if error.may_pass:
            raise
        log.error("base_model_unavailable", base_model=run.base_model, error=str(error))
        return Takeover(run, lease, model_error=str(error))
    state, snapshot_seq, damaged = _newest_state(storage, run, model)
    following = list(_following(storage, run, snapshot_seq))
    made = _last_made(following)
    if made is not None:
        state = _make_state(storage, run, model, following[made])
        del following[: made + 1]
    tail = [_fetch_one(storage, operation) for operation in following if _changes_state(operation)]
    with storage.database.read() as tx:
        failed = bool(journal.failed_gradients(tx, run.id, before_seq=run.state_seq + 1))
    failpoints.reach(Point.STATE_FETCHED)
    return Takeover(run, lease, model, None, state, snapshot_seq, tail, damaged, failed)


def load_checkpoint(storage: Storage, run: Run, model: ResidentModel, key: str, *, with_optimizer: bool) -> RunState:
    """A run's state as a checkpoint's object has it.

    Raises:
        StorageError, EngineError: it is gone, damaged, or does not fit the run.
    """
    data = storage.payloads.get_object(key)
    return RunState.from_checkpoint(model.base, LoraConfig(**run.lora), data, with_optimizer=with_optimizer)


def clears_gradients(operation: Operation) -> bool:
    """Whether a failed operation took the accumulated gradients with it: an `optim_step` that was begun."""
    return operation.status == Status.FAILED and operation.kind == Kind.OPTIM_STEP and operation.attempts > 0


def _newest_state(storage: Storage, run: Run, model: ResidentModel) -> tuple[RunState | None, int, list[int]]:
    damaged: list[int] = []
    with storage.database.read() as tx:
        written = snapshots.newest_first(tx, run.id)
    for snapshot in written:
        try:
            return _load_snapshot(storage, run, model, snapshot), snapshot.seq, damaged
        except (DamagedSnapshotError, ObjectNotFoundError, EngineError) as error:
            log.error("snapshot_damaged", run=run.id, seq=snapshot.seq, key=snapshot.object_key, error=str(error))
            damaged.append(snapshot.seq)
    return None, -1, damaged


def _load_snapshot(storage: Storage, run: Run, model: ResidentModel, snapshot: Snapshot) -> RunState:
    with closing(snapshots.read(storage.objects, snapshot)) as chunks:
        return RunState.deserialize(model.base, LoraConfig(**run.lora), chunks)


def _following(storage: Storage, run: Run, after_seq: int) -> Iterator[Operation]:
    """The run's operations after a snapshot that have taken effect."""
    while after_seq < run.state_seq:
        with storage.database.read() as tx:
            page = journal.list_operations(tx, run.id, limit=PAGE, after_seq=after_seq)
        if not page:
            raise NoStateError(run.id, f"the journal ends at {after_seq}, the state is at {run.state_seq}")
        yield from (operation for operation in page if operation.seq <= run.state_seq)
        after_seq = page[-1].seq


def _last_made(following: Sequence[Operation]) -> int | None:
    """Where the last operation stands that made the state anew."""
    made = [
        place
        for place, operation in enumerate(following)
        if operation.status == Status.COMPLETED and operation.kind in MAKES_STATE
    ]
    return made[-1] if made else None


def _make_state(storage: Storage, run: Run, model: ResidentModel, operation: Operation) -> RunState:
    body = _payload(storage, operation)
    if isinstance(body, CreateModel):
        return RunState.create(model.base, body.lora)
    assert isinstance(body, LoadState)
    key = body.object_key or operation.loads_key
    if key is None:
        raise NoStateError(run.id, f"operation {operation.seq} does not say what it loaded")
    return load_checkpoint(storage, run, model, key, with_optimizer=body.with_optimizer)


def _changes_state(operation: Operation) -> bool:
    completed = operation.status == Status.COMPLETED and operation.kind in COMPUTED_AGAIN
    return completed or clears_gradients(operation)


def _fetch_one(storage: Storage, operation: Operation) -> TailOperation:
    if clears_gradients(operation):
        return TailOperation(operation, None, None)
    body = _payload(storage, operation)
    assert isinstance(body, ForwardBackward | OptimStep)
    return TailOperation(operation, body, _recorded(storage, operation))


def _payload(storage: Storage, operation: Operation) -> operations.Body:
    run_id, seq = str(operation.run_id), operation.seq
    if operation.expired:
        raise NoStateError(run_id, f"seq {seq} has to be computed again, and what was submitted is no longer kept")
    try:
        body: operations.Body = operations.decode(storage.payloads.get(operation.payload))
    except (ObjectNotFoundError, DamagedObjectError, operations.UnreadableOperationError) as error:
        reason = f"seq {seq} has to be computed again, and what was submitted cannot be read: {error}"
        raise NoStateError(run_id, reason) from error
    return body


def _recorded(storage: Storage, operation: Operation) -> Outcome | None:
    """The outcome on record. The state can be rebuilt without it, only unchecked."""
    try:
        outcome: Outcome = operations.decode(storage.payloads.get(operation.outcome))
    except (ObjectNotFoundError, DamagedObjectError, operations.UnreadableOperationError) as error:
        log.error("recorded_outcome_unreadable", request=operation.request_id, error=str(error))
        return None
    return outcome
