"""One training turn: choose, pack, step, commit. Runs of several accounts go through the base model together."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import structlog

from billing import pauses
from billing.budgets import Budget
from billing.metering import split_ns
from billing.pauses import COSTLY
from billing.usage import Usage
from jobs.operations import (
    Category,
    CreateModel,
    Failure,
    ForwardBackward,
    Loaded,
    LoadState,
    ModelCreated,
    OptimStep,
    Outcome,
    SaveExternal,
    SaveForSampler,
    SaveState,
)
from storage import checkpoints, failpoints, journal, suspects
from storage.failpoints import Point
from storage.ids import CheckpointPath
from storage.journal import Operation
from storage.open import Storage
from storage.retry import retrying
from worker import faults
from worker.active_run import ActiveRun, Queued
from worker.commit import Committer, Done, RunCommit
from worker.engine.optimizer import optim_step
from worker.engine.run_state import RunState
from worker.engine.trainer import TrainRequest
from worker.residency import ResidentModel
from worker.saving import SavedWeights, copy_weights, store_weights
from worker.takeover import COMPUTED_AGAIN, load_checkpoint
from worker.work_meter import WorkMeter

log = structlog.get_logger()


@dataclass(eq=False)
class Plan:
    """What a turn does for one run: operations that failed before, gradients, and at most one step that ends it.

    A suspect is the only one that is begun, in its plan and in its turn.

    Attributes:
        begun: what is executed, or found to be impossible: all but what had failed before, or is condemned.
        is_of_a_suspect: nothing else may be executed in the same turn.
        outcomes, device_ns: by `seq`; an outcome is None until it is known, and for what had failed before.
        saved, loaded: of a save or a load, which is alone in its plan.
        state_is_spoilt: something raised in the middle of changing the run's state.
    """

    run: ActiveRun
    taken: list[Queued] = field(default_factory=list)
    begun: list[Operation] = field(default_factory=list)
    is_of_a_suspect: bool = False
    outcomes: dict[int, Outcome | None] = field(default_factory=dict)
    device_ns: dict[int, int] = field(default_factory=dict)
    state_is_spoilt: bool = False
    saved: SavedWeights | None = None
    loaded: tuple[RunState, str] | None = None

    def add(self, queued: Queued, outcome: Outcome | None = None) -> None:
        """Take the head of the run's queue into the turn."""
        operation = queued.operation
        self.taken.append(queued)
        self.outcomes[operation.seq] = outcome
        if queued.body is not None and not suspects.is_condemned(operation.blame):
            self.begun.append(operation)
            self.is_of_a_suspect |= operation.suspect

    def cut_what_is_begun(self) -> None:
        """Leave only what has an outcome already at its head."""
        begun = {operation.seq for operation in self.begun}
        self.taken = list(itertools.takewhile(lambda queued: queued.operation.seq not in begun, self.taken))
        self.begun.clear()

    def passes(self) -> list[tuple[Operation, ForwardBackward]]:
        """What goes through the base model."""
        return [(item.operation, item.body) for item in self.taken if isinstance(item.body, ForwardBackward)]


@dataclass(frozen=True)
class TurnReport:
    """What a turn consumed, in nanoseconds, by account.

    Attributes:
        tails_ns: what a death at this commit would have made others compute again, of each run that was committed.
    """

    device_ns: dict[str, int]
    tails_ns: list[int]


class TrainTurn:
    """Executes turns. On the engine's thread, but for uploads and downloads."""

    def __init__(
        self,
        storage: Storage,
        committer: Committer,
        meter: WorkMeter,
        io: ThreadPoolExecutor,
        *,
        worker_id: str,
        device: str,
    ) -> None:
        self._storage = storage
        self._committer = committer
        self._meter = meter
        self._io = io
        self._worker_id = worker_id
        self._device = device
        self._wake: Callable[[], None] = lambda: None
        self._progress: Callable[[], None] = lambda: None

    def wake_after_io(self, wake: Callable[[], None]) -> None:
        """Have `wake` called whenever an upload or download has ended."""
        self._wake = wake

    def report_progress(self, progress: Callable[[], None]) -> None:
        """Have `progress` called before each pass through a base model, and while storage is waited for."""
        self._progress = self._committer.on_wait = progress

    def take(self, runs: Sequence[ActiveRun], *, tokens_max: int) -> TurnReport | None:
        """One turn over these runs, which are ready, share a base model and stand in order of fairness.

        A suspect whose turn it is has it to itself; the others' turns go on without it.

        Returns:
            None if all that was done was to begin uploads and downloads.
        """
        plans: list[Plan] = []
        tokens_left = tokens_max
        for run in runs:
            plan, tokens = self._plan(run, tokens_left, first=not plans)
            tokens_left -= tokens
            if plan.taken:
                plans.append(plan)
            if plan.is_of_a_suspect:
                break
        begun = self._begin(plans)
        return self._execute(begun) if begun else None

    def _plan(self, run: ActiveRun, tokens_left: int, *, first: bool) -> tuple[Plan, int]:
        """Take operations from the head of the queue as long as they fit."""
        plan, tokens = Plan(run), 0
        for queued in list(run.queue):
            body, operation = queued.body, queued.operation
            if body is None:
                plan.add(queued, queued.failure)
            elif suspects.is_condemned(operation.blame):
                plan.add(queued, Failure(suspects.sentence(operation.blame), Category.SERVER))
                if isinstance(body, OptimStep):
                    break
            elif plan.is_of_a_suspect or (operation.suspect and (plan.begun or not first)):
                break
            elif run.model is None:
                reason = run.model_error or "its base model cannot be loaded"
                plan.add(queued, Failure(f"the operation cannot run: {reason}", Category.SERVER))
            elif isinstance(body, CreateModel | LoadState | SaveState | SaveForSampler | SaveExternal):
                if not plan.taken:
                    self._resolve(plan, queued, run.model)
                break
            elif run.state is None:
                plan.add(queued, Failure("the training run was never made: its first operation failed"))
            elif isinstance(body, ForwardBackward):
                fits = tokens + body.num_tokens <= tokens_left or (first and not plan.passes())
                if not fits:
                    break
                tokens += body.num_tokens
                plan.add(queued)
            else:
                plan.add(queued)
                break
        return plan, tokens

    def _resolve(self, plan: Plan, queued: Queued, model: ResidentModel) -> None:
        """Bring an operation that needs no pass to its outcome, unless its upload or download is still under way."""
        run, body = plan.run, queued.body
        if isinstance(body, CreateModel):
            plan.add(queued)
            return
        if run.state is None and not (isinstance(body, LoadState) and queued.operation.seq == 0):
            plan.add(queued, Failure("the training run was never made: its first operation failed"))
            return
        try:
            if run.pending is None:
                run.pending = self._begin_io(run, queued, model)
                run.pending.add_done_callback(lambda _: self._wake())
            if not run.pending.done():
                return
            pending, run.pending = run.pending, None
            result = pending.result()
        except Exception as error:
            plan.add(queued, faults.failure_of(queued.operation, error))
            return
        if isinstance(result, SavedWeights):
            plan.saved = result
            plan.add(queued, result.outcome)
        else:
            plan.loaded = result
            assert isinstance(body, LoadState)
            plan.add(queued, Loaded(run.id, body.path))

    def _begin_io(self, run: ActiveRun, queued: Queued, model: ResidentModel) -> Future[Any]:
        body, seq = queued.body, queued.operation.seq
        if isinstance(body, LoadState):
            return self._io.submit(self._load, run, queued.operation, body, model)
        assert run.state is not None
        assert isinstance(body, SaveState | SaveForSampler | SaveExternal)
        files = copy_weights(run.state, body)
        store = partial(store_weights, self._storage, run.run, seq, body, files)
        return self._io.submit(retrying, store)

    def _load(
        self, run: ActiveRun, operation: Operation, body: LoadState, model: ResidentModel
    ) -> tuple[RunState, str]:
        key = body.object_key or retrying(lambda: self._resolve_path(operation, body))
        state = retrying(
            lambda: load_checkpoint(self._storage, run.run, model, key, with_optimizer=body.with_optimizer)
        )
        return state, key

    def _resolve_path(self, operation: Operation, body: LoadState) -> str:
        path = CheckpointPath.parse(body.path)
        with self._storage.database.read() as tx:
            now = self._storage.database.now(tx)
            return checkpoints.get(tx, path, now=now, reader=operation.account_id).object_key

    def _begin(self, plans: Sequence[Plan]) -> Sequence[Plan]:
        """Write down what is begun; of runs that a cap pauses, only what had failed before is left in the turn.

        Where there is no such thing, the run is put aside until it is announced again.
        """
        failpoints.reach(Point.TURN_BEGUN)
        paused = self._start(plans)
        for plan in plans:
            if plan.run.id in paused:
                plan.cut_what_is_begun()
                if not plan.taken:
                    log.info("run_paused", run=plan.run.id, budget=paused[plan.run.id].name)
                    plan.run.put_aside()
        failpoints.reach(Point.TURN_STARTED)
        return [plan for plan in plans if plan.taken]

    def _execute(self, plans: Sequence[Plan]) -> TurnReport:
        for plan in plans:
            self._run_create(plan)
        self._run_passes(plans)
        for plan in plans:
            self._run_step(plan)
        failpoints.reach(Point.TURN_COMPUTED)
        commits = [self._commit_of(plan) for plan in plans]
        lost = self._committer.commit_runs(commits)
        for plan in plans:
            if plan.run.id not in lost:
                _move_on(plan)
            if plan.run.id in lost or plan.state_is_spoilt:
                plan.run.void = True  # whoever takes the run over makes its state anew
        return self._report(plans, lost)

    def _start(self, plans: Sequence[Plan]) -> Mapping[str, Budget]:
        costly = {plan.run.id for plan in plans if any(one.kind in COSTLY for one in plan.begun)}

        def write() -> Mapping[str, Budget]:
            with self._storage.database.begin() as tx:
                now = self._storage.database.now(tx)
                paused = pauses.paused_runs(tx, costly, now=now) if costly else {}
                begun = [one.id for plan in plans if plan.run.id not in paused for one in plan.begun]
                journal.start(tx, begun, worker_id=self._worker_id, now=now, alone=len(begun) == 1)
                return paused

        if not any(plan.begun for plan in plans):
            return {}
        return retrying(write, on_wait=self._progress)

    def _run_create(self, plan: Plan) -> None:
        first, run = plan.taken[0], plan.run
        if not isinstance(first.body, CreateModel) or plan.outcomes[first.operation.seq] is not None:
            return
        assert run.model is not None
        outcome: Outcome = ModelCreated(run.id)
        try:
            run.state = RunState.create(run.model.base, first.body.lora)
        except Exception as error:
            outcome = faults.failure_of(first.operation, error)
        plan.outcomes[first.operation.seq] = outcome

    def _run_passes(self, plans: Sequence[Plan]) -> None:
        """The packed pass: all `forward` and `forward_backward` of all plans."""
        asked = [
            (plan, operation, TrainRequest(plan.run.state, body))
            for plan in plans
            if plan.run.state is not None and plan.run.model is not None
            for operation, body in plan.passes()
            if plan.outcomes[operation.seq] is None
        ]
        if not asked:
            return
        model = asked[0][0].run.model
        assert model is not None
        results = self._run_together(model, [request for _, _, request in asked])
        for (plan, operation, _), (outcome, share) in zip(asked, results, strict=True):
            plan.outcomes[operation.seq] = outcome
            plan.device_ns[operation.seq] = share

    def _run_together(self, model: ResidentModel, requests: Sequence[TrainRequest]) -> list[tuple[Outcome, int]]:
        """Outcome and share of device time of each; what breaks the pass is found by running each alone."""
        try:
            with self._meter.clock.measure() as measured:
                report = model.trainer.run(requests, on_pass=self._progress)
        except Exception as error:
            log.exception("training_pass_failed", requests=len(requests))
            self._meter.waste(measured.device_ns)
            faults.raise_if_device_is_lost(error)
            failure = faults.unexpected(error, "operation")
        else:
            return list(zip(report.outcomes, split_ns(measured.device_ns, report.work), strict=True))
        if len(requests) == 1:
            return [(failure, 0)]
        faults.free_unused_memory(model.base.device)  # not before the exception is gone, which holds the pass's tensors
        return [self._run_together(model, [request])[0] for request in requests]

    def _run_step(self, plan: Plan) -> None:
        last = plan.taken[-1]
        state = plan.run.state
        if not isinstance(last.body, OptimStep) or state is None:
            return
        if suspects.is_condemned(last.operation.blame):
            state.clear_gradients()  # as a replay does: it was begun, and failed
            return
        if plan.outcomes[last.operation.seq] is not None:
            return
        failed_seq = self._failure_behind(plan, last.operation)
        if failed_seq is not None:
            state.clear_gradients()
            plan.outcomes[last.operation.seq] = Failure(
                f"forward_backward with seq_id {failed_seq} failed, and this optim_step was submitted before that was "
                "known: nothing was changed and the gradients were cleared; submit the forward_backward again"
            )
            return
        with self._meter.clock.measure() as measured:
            try:
                outcome: Outcome = optim_step(state, last.body)
            except Exception as error:
                outcome = faults.failure_of(last.operation, error)
                plan.state_is_spoilt = True
        plan.outcomes[last.operation.seq] = outcome
        plan.device_ns[last.operation.seq] = measured.device_ns

    def _failure_behind(self, plan: Plan, step: Operation) -> int | None:
        """The failed `forward_backward` that this step was submitted without knowing of."""
        for operation, _ in plan.passes():
            if isinstance(plan.outcomes[operation.seq], Failure) and operation.kind == "forward_backward":
                return operation.seq
        known_failures = plan.run.gradients_failed or any(item.operation.lost_gradients for item in plan.taken)
        if not known_failures:
            return None
        failed = retrying(lambda: self._failed_gradients(plan.run, step), on_wait=self._progress)
        return next((seq for seq, number in failed if number > step.failures_seen), None)

    def _failed_gradients(self, run: ActiveRun, step: Operation) -> Sequence[tuple[int, int]]:
        with self._storage.database.read() as tx:
            return journal.failed_gradients(tx, run.id, before_seq=step.seq)

    def _commit_of(self, plan: Plan) -> RunCommit:
        done = []
        for item in plan.taken:
            operation = item.operation
            outcome = plan.outcomes[operation.seq]
            publish = plan.saved.publish if plan.saved is not None else None
            if plan.loaded is not None:
                publish = partial(journal.record_load, operation=operation, loads_key=plan.loaded[1])
            done.append(Done(operation, outcome, self._usage(item, plan), publish))
        return RunCommit(plan.run.run, plan.run.lease, done)

    def _usage(self, item: Queued, plan: Plan) -> Usage:
        trained = item.body.num_tokens if isinstance(item.body, ForwardBackward) else 0
        return Usage(
            device=self._device,
            device_ns=plan.device_ns.get(item.operation.seq, 0),
            attempt=item.operation.attempts + 1,
            worker_id=self._worker_id,
            tokens_trained=trained,
        )

    def _report(self, plans: Sequence[Plan], lost: set[str]) -> TurnReport:
        per_account: dict[str, int] = {}
        for plan in plans:
            account = plan.run.run.account_id
            per_account[account] = per_account.get(account, 0) + sum(plan.device_ns.values())
        return TurnReport(per_account, [plan.run.tail.device_ns for plan in plans if plan.run.id not in lost])


def _move_on(plan: Plan) -> None:
    """Bring the run in memory to what has been committed."""
    run = plan.run
    run.tail.shorten(run.snapshot_seq)
    for item in plan.taken:
        assert run.queue[0] is item
        run.queue.popleft()
        outcome = plan.outcomes[item.operation.seq]
        if item.operation.kind in COMPUTED_AGAIN and not isinstance(outcome, Failure):
            run.tail.add(item.operation.seq, plan.device_ns.get(item.operation.seq, 0))
        if isinstance(item.body, OptimStep):
            run.gradients_failed = False
        elif item.operation.lost_gradients or (
            isinstance(outcome, Failure) and item.operation.kind == "forward_backward"
        ):
            run.gradients_failed = True
    if plan.loaded is not None:
        run.state = plan.loaded[0]
    run.state_seq = plan.taken[-1].operation.seq
    run.used_at = time.monotonic()
