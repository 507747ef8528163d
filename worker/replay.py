"""The tail of a run is computed again, a pass or a step at a time, and each outcome held against the one on record.

Never billed. Between two of its steps others have their turn, and the watchdog sees that the worker lives.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import takewhile

import structlog

from billing.metering import split_ns
from jobs.operations import Failure, ForwardBackward, OptimStep, Outcome
from storage import failpoints
from storage.failpoints import Point
from worker.active_run import ActiveRun
from worker.engine.optimizer import optim_step
from worker.engine.run_state import RunState
from worker.engine.timing import DeviceClock
from worker.engine.trainer import TrainRequest
from worker.errors import NoStateError
from worker.replay_check import distance
from worker.replay_tail import ReplayTail
from worker.residency import ResidentModel
from worker.takeover import TailOperation, Takeover

log = structlog.get_logger()


class Replay:
    """One run on its way from a snapshot to its committed state. On the engine's thread.

    Attributes:
        takeover: what was fetched.
        num_replayed: operations computed again so far.
        num_mismatches: those of them whose outcome was not the one on record.
        is_written_down: whether the journal knows that this worker has begun it.
    """

    def __init__(
        self,
        takeover: Takeover,
        clock: DeviceClock,
        *,
        tokens_max: int,
        bound: float,
        on_pass: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare it.

        Args:
            takeover: what was fetched.
            clock: measures what the tail costs.
            tokens_max: of the operations that go through one pass.
            bound: distance from the record (`replay_check.distance`) beyond which an outcome is a mismatch on CUDA; on
                CPU it is 0.
            on_pass: called before each pass through the base model: a sign of life for the watchdog.
        """
        self.takeover = takeover
        self.num_replayed = 0
        self.num_mismatches = 0
        self.is_written_down = False
        self._clock = clock
        self._tokens_max = tokens_max
        self._bound = bound
        self._on_pass = on_pass
        self._left = deque(takeover.tail)
        self._tail = ReplayTail()

    @property
    def is_done(self) -> bool:
        """Whether the state is the committed one."""
        return not self._left

    def advance(self) -> None:
        """Compute what goes through one pass, or one step.

        Raises:
            NoStateError: the tail does not give the state back.
        """
        first = self._left[0]
        if first.body is None:
            if self.takeover.state is not None:
                self.takeover.state.clear_gradients()
            self._left.popleft()
            return
        model, state = self.takeover.model, self.takeover.state
        if model is None or state is None:
            raise NoStateError(self.takeover.run.id, "there is nothing to replay on")
        done = [first] if isinstance(first.body, OptimStep) else self._next_pass()
        for step, (outcome, device_ns) in zip(done, self._compute(model, state, done), strict=True):
            self._check(step, outcome, exact=model.base.device.type == "cpu")
            self._tail.add(step.operation.seq, device_ns)
            self._left.popleft()

    def go_alone(self) -> bool:
        """Compute operations one by one from now on, since memory was wanting; False if that is done already."""
        were_together, self._tokens_max = self._tokens_max > 0, 0
        return were_together

    def finish(self) -> ActiveRun:
        """The run, ready for its next operation."""
        takeover, run = self.takeover, self.takeover.run
        failpoints.reach(Point.TAIL_REPLAYED)
        if takeover.tail:
            log.info(
                "replayed",
                run=run.id,
                snapshot=takeover.snapshot_seq,
                seq=run.state_seq,
                operations=self.num_replayed,
                mismatches=self.num_mismatches,
                device_s=self._tail.device_ns / 1e9,
            )
        return ActiveRun(
            run,
            takeover.lease,
            takeover.model,
            takeover.state,
            state_seq=run.state_seq,
            snapshot_seq=takeover.snapshot_seq,
            model_error=takeover.model_error,
            damaged=takeover.damaged,
            tail=self._tail,
            gradients_failed=takeover.gradients_failed,
        )

    def _next_pass(self) -> list[TailOperation]:
        """Operations that go through the base model together: their results do not depend on their company."""
        tokens = 0

        def fits(step: TailOperation) -> bool:
            nonlocal tokens
            if not isinstance(step.body, ForwardBackward):
                return False
            tokens += step.body.num_tokens
            return tokens <= self._tokens_max

        return list(takewhile(fits, self._left)) or [self._left[0]]

    def _compute(
        self, model: ResidentModel, state: RunState, steps: Sequence[TailOperation]
    ) -> list[tuple[Outcome, int]]:
        """Outcome and device time of each."""
        first = steps[0].body
        if isinstance(first, OptimStep):
            with self._clock.measure() as measured:
                outcome = optim_step(state, first)
            return [(outcome, measured.device_ns)]
        requests = [TrainRequest(state, step.body) for step in steps if isinstance(step.body, ForwardBackward)]
        report = model.trainer.run(requests, on_pass=self._on_pass)
        return list(zip(report.outcomes, split_ns(report.device_ns, report.work), strict=True))

    def _check(self, step: TailOperation, outcome: Outcome, *, exact: bool) -> None:
        run_id, operation = self.takeover.run.id, step.operation
        self.num_replayed += 1
        off = distance(outcome, step.recorded)
        if off > (0.0 if exact else self._bound):
            self.num_mismatches += 1
            log.error("replay_mismatch", run=run_id, seq=operation.seq, kind=operation.kind, distance=off)
        if isinstance(outcome, Failure):
            reason = f"seq {operation.seq} is on record as completed, and fails now: {outcome.error}"
            raise NoStateError(run_id, reason)
