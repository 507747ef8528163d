"""Samples in the engine: stepped together, committed with their claim checked."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import structlog

from billing.dimensions import Dimensions
from billing.metering import split_ns
from billing.usage import Usage
from jobs.operations import Failure, Outcome, Sample
from storage.journal import Operation
from storage.runs import SamplingSession
from worker import faults
from worker.commit import Committer, SampleCommit
from worker.engine.adapter import Adapter
from worker.residency import ResidentModel
from worker.sampler.reports import Finished, SamplerStep
from worker.spent_caps import SpentCaps
from worker.work_meter import WorkMeter

log = structlog.get_logger()


@dataclass(frozen=True, eq=False)
class Drawable:
    """What a sample is drawn from, in memory."""

    body: Sample
    model: ResidentModel
    adapter: Adapter | None


@dataclass(eq=False)
class ClaimedSample:
    """A sample this worker has claimed: to be drawn, or failed already.

    Attributes:
        payer: whom it is charged to, as it was when it was claimed.
        device_ns: what it has used so far.
    """

    operation: Operation
    session: SamplingSession
    payer: Dimensions
    work: Drawable | Failure
    device_ns: int = 0


class SampleTurn:
    """The samples this worker has claimed. What other threads call is locked; the rest is the engine's thread's.

    A step that raises names no culprit: all samples of that model become suspects and are drawn one at a time, so that
    only the one that raises alone fails.

    What a spent cap covers is not begun: it is withheld, for the feeder to give its claim back. What is being drawn may
    end.

    Attributes:
        caps: what is known of spent ones; every commit of this worker adds to it.
    """

    def __init__(self, committer: Committer, meter: WorkMeter, *, worker_id: str, device: str) -> None:
        self._committer = committer
        self._meter = meter
        meter.under_way_ns = self._under_way_ns
        self.caps = SpentCaps()
        self._caps_version = self.caps.version
        committer.on_spent = self.caps.add
        self._worker_id = worker_id
        self._device = device
        self._wake: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._expected: dict[int, Operation] = {}
        self._arrived: list[ClaimedSample] = []
        self._lost: list[Operation] = []
        self._withheld: list[Operation] = []
        self._in_engine: dict[str, ClaimedSample] = {}
        self._suspects: deque[ClaimedSample] = deque()

    def wake_on_arrival(self, wake: Callable[[], None]) -> None:
        """Have `wake` called whenever there is something to admit."""
        self._wake = wake

    # ------------------------------------------------------------------------------------------- from other threads

    def expect(self, operations: Iterable[Operation]) -> None:
        """These have been claimed; each will arrive, or be forgotten. Their claims are renewed from now on."""
        with self._lock:
            self._expected.update({operation.id: operation for operation in operations})

    def forget(self, operations: Iterable[Operation]) -> None:
        """Renew these no longer: they could not be brought into memory, and somebody else may try."""
        with self._lock:
            for operation in operations:
                self._expected.pop(operation.id, None)

    def arrive(self, claimed: ClaimedSample) -> None:
        """A claimed sample is in memory."""
        with self._lock:
            self._arrived.append(claimed)
        self._wake()

    def claims(self) -> dict[int, Operation]:
        """Everything whose claim is to be renewed, by the id of its row."""
        with self._lock:
            held = [claimed.operation for claimed in [*self._in_engine.values(), *self._arrived]]
            return self._expected | {operation.id: operation for operation in [*self._withheld, *held]}

    def note_lost(self, operations: Iterable[Operation]) -> None:
        """Claims of these do not stand any more: cancelled, or another's."""
        with self._lock:
            self._lost.extend(operations)

    def withheld(self) -> Sequence[Operation]:
        """What has left the engine because a cap is spent, and whose claim is still to be given back."""
        with self._lock:
            return list(self._withheld)

    def note_given_back(self, operations: Iterable[Operation]) -> None:
        """Claims of these, which were withheld, have been given back."""
        gone = {id(operation) for operation in operations}
        with self._lock:
            self._withheld = [operation for operation in self._withheld if id(operation) not in gone]

    def models_in_use(self) -> set[str]:
        """Base models that must stay in memory."""
        with self._lock:
            held = {claimed.session.base_model for claimed in [*self._in_engine.values(), *self._arrived]}
            return held | {operation.base_model for operation in self._expected.values()}

    def __len__(self) -> int:
        return len(self.claims())

    # ------------------------------------------------------------------------------------------ on the engine's thread

    def accounts(self) -> set[str]:
        """Whose samples are in the engine."""
        return {claimed.operation.account_id for claimed in self._in_engine.values()}

    def model_of(self, account_id: str) -> ResidentModel:
        """The model that an account's oldest sample is drawn from."""
        mine = (claimed for claimed in self._in_engine.values() if claimed.operation.account_id == account_id)
        return next(claimed.work.model for claimed in mine if isinstance(claimed.work, Drawable))

    def admit(self) -> bool:
        """Begin what has arrived and end what was lost; whether anything was withheld: the feeder is to know."""
        with self._lock:
            arrived, self._arrived = self._arrived, []
            lost, self._lost = self._lost, []
            for claimed in arrived:
                self._expected.pop(claimed.operation.id, None)
        for operation in lost:
            inside = self._in_engine.get(operation.request_id)
            if inside is not None and inside.operation is operation:  # it may have been claimed again since
                self._drop(operation.request_id)
        failed = []
        for claimed in arrived:
            self._drop(claimed.operation.request_id)  # claimed again: this is the new attempt
            if isinstance(claimed.work, Failure):
                failed.append(self._commit_of(claimed, Finished(claimed.operation.request_id, claimed.work)))
            else:
                self._begin(claimed)
        if failed:
            self._committer.commit_samples(failed)
        return self._withhold(arrived)

    def take(self, model: ResidentModel) -> dict[str, int]:
        """One step of a model's sampler: every sequence in it moves on by a token or a part of its prompt.

        Returns:
            What each account has consumed, in nanoseconds.
        """
        self._release_suspect(model)
        try:
            with self._meter.clock.measure() as measured:
                step = model.sampler.step()
        except Exception as error:
            log.error("sampling_step_failed", base_model=model.base.name, exc_info=error)
            faults.raise_if_device_is_lost(error)
            failure = faults.unexpected(error, "sample")
            self._meter.waste(measured.device_ns)
        else:
            return self._share(step, measured.device_ns)
        faults.free_unused_memory(model.base.device)  # not before the exception is gone: it holds the step's tensors
        self._suspect(model, failure)
        return {}

    def _share(self, step: SamplerStep, device_ns: int) -> dict[str, int]:
        """Split a step's device time among its samples, and commit those that it has finished."""
        *shares, overhead_ns = split_ns(device_ns, [*step.work.values(), step.overhead])
        self._meter.waste(overhead_ns)
        per_account: dict[str, int] = {}
        for request_id, share in zip(step.work, shares, strict=True):
            claimed = self._in_engine[request_id]
            claimed.device_ns += share
            account = claimed.operation.account_id
            per_account[account] = per_account.get(account, 0) + share
        self._finish(step.finished)
        return per_account

    def _finish(self, finished: Sequence[Finished]) -> None:
        """Commit what is done."""
        if finished:
            done = [(self._remove(one.request_id), one) for one in finished]
            self._committer.commit_samples([self._commit_of(claimed, one) for claimed, one in done])

    def _begin(self, claimed: ClaimedSample) -> None:
        with self._lock:
            self._in_engine[claimed.operation.request_id] = claimed
        if self._suspects:
            self._suspects.append(claimed)
        else:
            self._submit(claimed)

    def _submit(self, claimed: ClaimedSample) -> None:
        work = claimed.work
        assert isinstance(work, Drawable)
        # another account must not learn from a hit what this one has asked
        scope = f"{claimed.operation.account_id}/{claimed.session.object_key or ''}"
        work.model.sampler.submit(claimed.operation.request_id, work.body, work.adapter, scope=scope)

    def _withhold(self, arrived: Sequence[ClaimedSample]) -> bool:
        """Take out of the engine what a spent cap covers and what is not being drawn."""
        version, seen = self.caps.version, self._caps_version
        self._caps_version = version
        asked = arrived if version == seen else list(self._in_engine.values())  # of the others it is known already
        paused = [claimed for claimed in asked if self.caps.pause(claimed.payer) and self._is_waiting(claimed)]
        if paused:
            log.info("samples_withheld", samples=len(paused), accounts=len({one.payer.account_id for one in paused}))
            with self._lock:
                self._withheld.extend(claimed.operation for claimed in paused)
            for claimed in paused:
                self._drop(claimed.operation.request_id)
        return bool(paused)

    def _is_waiting(self, claimed: ClaimedSample) -> bool:
        """Whether a sample is in the engine, and not being drawn."""
        request_id, work = claimed.operation.request_id, claimed.work
        if self._in_engine.get(request_id) is not claimed or isinstance(work, Failure):
            return False
        return claimed in self._suspects or work.model.sampler.is_waiting(request_id)

    def _drop(self, request_id: str) -> None:
        """Take a sample out of the engine, if it is there; what it has used was in vain."""
        if request_id not in self._in_engine:
            return
        claimed = self._remove(request_id)
        assert isinstance(claimed.work, Drawable)
        claimed.work.model.sampler.cancel(request_id)
        self._meter.waste(claimed.device_ns)

    def _remove(self, request_id: str) -> ClaimedSample:
        with self._lock:
            claimed = self._in_engine.pop(request_id)
        if claimed in self._suspects:
            self._suspects.remove(claimed)
        return claimed

    def _suspect(self, model: ResidentModel, failure: Failure) -> None:
        """A step raised: fail the sample that was alone in it, or draw each alone from now on."""
        inside = [
            claimed
            for claimed in self._in_engine.values()
            if isinstance(claimed.work, Drawable) and claimed.work.model is model and claimed not in self._suspects
        ]
        for claimed in inside:
            model.sampler.cancel(claimed.operation.request_id)
            self._meter.waste(claimed.device_ns)
            claimed.device_ns = 0
        if len(inside) == 1:
            self._finish([Finished(inside[0].operation.request_id, failure)])
        else:
            self._suspects.extend(inside)

    def _under_way_ns(self) -> int:
        return sum(claimed.device_ns for claimed in self._in_engine.values())

    def _release_suspect(self, model: ResidentModel) -> None:
        """Let the next suspect begin once nothing else is being drawn from its model."""
        if self._suspects and not model.sampler.has_work:
            self._submit(self._suspects.popleft())

    def _commit_of(self, claimed: ClaimedSample, finished: Finished) -> SampleCommit:
        usage = Usage(
            device=self._device,
            device_ns=claimed.device_ns,
            attempt=claimed.operation.attempts,
            worker_id=self._worker_id,
            tokens_prefilled=finished.tokens_prefilled,
            tokens_cached=finished.tokens_cached,
            tokens_sampled=finished.tokens_sampled,
        )
        outcome: Outcome = finished.outcome
        return SampleCommit(claimed.operation, claimed.session, outcome, usage)
