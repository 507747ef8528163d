"""Lease → snapshot → replay of the tail → ready: `state(seq) = snapshot(s) + replay of operations s+1 … seq`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import structlog

from jobs import operations
from jobs.operations import Body, CreateModel, Failure, ForwardBackward, LoadState, LoraConfig, OptimStep, Outcome
from storage import failpoints, journal, leases, runs, snapshots
from storage.errors import ObjectNotFoundError
from storage.failpoints import Point
from storage.journal import Operation, Status
from storage.leases import Lease
from storage.open import Storage
from storage.runs import Run
from storage.snapshots import DamagedSnapshotError, Snapshot
from worker.active_run import ActiveRun
from worker.engine.errors import EngineError
from worker.engine.optimizer import optim_step
from worker.engine.run_state import RunState
from worker.engine.trainer import TrainRequest
from worker.errors import ModelUnavailableError, NoStateError
from worker.residency import BaseModels, ResidentModel

log = structlog.get_logger()

PAGE = 200


@dataclass(frozen=True, eq=False)
class TailOperation:
    """A committed operation to be replayed, with the outcome that is on record."""

    operation: Operation
    body: Body | None
    recorded: bytes


@dataclass(frozen=True, eq=False)
class Takeover:
    """Everything a replay needs, fetched; `replay` makes it an active run."""

    run: Run
    lease: Lease
    model: ResidentModel | None
    model_error: str | None
    state: RunState | None
    state_at: int
    tail: Sequence[TailOperation]
    gradients_failed: bool


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
    return Takeover(run, lease, None, reason, None, -1, (), gradients_failed=False)


def fetch(storage: Storage, models: BaseModels, run: Run, lease: Lease, *, in_use: Collection[str]) -> Takeover:
    """Load base model, newest good snapshot and tail; slow, and not for the engine's thread."""
    model, model_error = _find_model(models, run.base_model, in_use)
    state, state_at = (None, -1) if model is None else _newest_state(storage, run, model)
    with storage.database.read() as tx:
        failed = bool(journal.failed_gradients(tx, run.id, before_seq=run.state_seq + 1))
    tail = [] if model is None else _tail(storage, run, state_at)
    failpoints.reach(Point.STATE_FETCHED)
    return Takeover(run, lease, model, model_error, state, state_at, tail, failed)


def replay(storage: Storage, takeover: Takeover, *, on_progress: Callable[[], None]) -> ActiveRun:
    """Execute the tail again and compare with what is on record. On the engine's thread; never billed.

    Args:
        on_progress: called before each operation: a sign of life for the watchdog.

    Raises:
        NoStateError: the tail does not give the state back.
    """
    run, state = takeover.run, takeover.state
    for step in takeover.tail:
        on_progress()
        if takeover.model is None:
            raise NoStateError(run.id, "there is no base model to replay on")
        state = _replay_one(storage, run, takeover.model, state, step)
    failpoints.reach(Point.TAIL_REPLAYED)
    if takeover.tail:
        log.info("replayed", run=run.id, snapshot=takeover.state_at, seq=run.state_seq, operations=len(takeover.tail))
    return ActiveRun(
        run,
        takeover.lease,
        takeover.model,
        state,
        state_seq=run.state_seq,
        snapshot_seq=takeover.state_at,
        model_error=takeover.model_error,
        gradients_failed=takeover.gradients_failed,
    )


def load_checkpoint(storage: Storage, run: Run, model: ResidentModel, key: str, *, with_optimizer: bool) -> RunState:
    """A run's state as a checkpoint's object has it.

    Raises:
        StorageError, EngineError: it is gone, damaged, or does not fit the run.
    """
    data = storage.objects.get(key)
    return RunState.from_checkpoint(model.base, LoraConfig(**run.lora), data, with_optimizer=with_optimizer)


def _find_model(models: BaseModels, name: str, in_use: Collection[str]) -> tuple[ResidentModel | None, str | None]:
    try:
        return models.get(name, in_use=in_use), None
    except ModelUnavailableError as error:
        log.error("base_model_unavailable", base_model=name, error=str(error))
        return None, str(error)


def _newest_state(storage: Storage, run: Run, model: ResidentModel) -> tuple[RunState | None, int]:
    with storage.database.read() as tx:
        written = snapshots.newest_first(tx, run.id)
    for snapshot in written:
        try:
            return _load_snapshot(storage, run, model, snapshot), snapshot.seq
        except (DamagedSnapshotError, ObjectNotFoundError, EngineError) as error:
            log.error("snapshot_unusable", run=run.id, seq=snapshot.seq, key=snapshot.object_key, error=str(error))
    return None, -1


def _load_snapshot(storage: Storage, run: Run, model: ResidentModel, snapshot: Snapshot) -> RunState:
    data = storage.objects.get(snapshot.object_key)
    snapshots.verify(snapshot, data)
    return RunState.deserialize(model.base, LoraConfig(**run.lora), data)


def _tail(storage: Storage, run: Run, state_at: int) -> list[TailOperation]:
    tail: list[TailOperation] = []
    while state_at < run.state_seq:
        with storage.database.read() as tx:
            page = journal.list_operations(tx, run.id, limit=PAGE, after_seq=state_at)
        for operation in page:
            if operation.seq <= run.state_seq:
                tail.append(_fetch_one(storage, operation))
        if not page:
            raise NoStateError(run.id, f"the journal ends at {state_at}, the state is at {run.state_seq}")
        state_at = page[-1].seq
    return tail


def _fetch_one(storage: Storage, operation: Operation) -> TailOperation:
    if operation.status != Status.COMPLETED or operation.kind.startswith("save"):
        return TailOperation(operation, None, b"")
    if operation.expired:
        raise NoStateError(str(operation.run_id), f"the payload of seq {operation.seq} is gone")
    body = operations.decode(storage.payloads.get(operation.payload))
    return TailOperation(operation, body, storage.payloads.get(operation.outcome))


def _replay_one(
    storage: Storage, run: Run, model: ResidentModel, state: RunState | None, step: TailOperation
) -> RunState | None:
    operation, body = step.operation, step.body
    if isinstance(body, CreateModel):
        return RunState.create(model.base, body.lora)
    if isinstance(body, LoadState):
        key = body.object_key or operation.loads_key
        if key is None:
            raise NoStateError(run.id, f"operation {operation.seq} does not say what it loaded")
        return load_checkpoint(storage, run, model, key, with_optimizer=body.with_optimizer)
    if state is None:
        return None
    if clears_gradients(operation):
        state.clear_gradients()
    elif isinstance(body, ForwardBackward) and not body.forward_only:
        (outcome,) = model.trainer.run([TrainRequest(state, body)]).outcomes
        _compare(run, operation, outcome, step.recorded)
    elif isinstance(body, OptimStep):
        _compare(run, operation, optim_step(state, body), step.recorded)
    return state


def clears_gradients(operation: Operation) -> bool:
    """Whether a failed operation took the accumulated gradients with it: an `optim_step` that was begun."""
    return operation.status == Status.FAILED and operation.kind == "optim_step" and operation.attempts > 0


def _compare(run: Run, operation: Operation, outcome: Outcome, recorded: bytes) -> None:
    if isinstance(outcome, Failure):
        raise NoStateError(run.id, f"seq {operation.seq} is on record as completed, and fails now: {outcome.error}")
    if operations.encode(outcome) != recorded:
        log.error("replay_mismatch", run=run.id, seq=operation.seq, kind=operation.kind)
