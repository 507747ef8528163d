"""Samples in this worker: claimed from the journal, stepped together, committed with their claim checked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from billing.metering import split_ns
from billing.usage import Usage
from jobs import operations
from jobs.operations import Category, Failure, Outcome, Sample
from storage import journal, runs
from storage.errors import DatabaseUnavailableError
from storage.journal import Operation
from storage.open import Storage
from storage.runs import SamplingSession
from worker.commit import Committer, SampleCommit
from worker.engine.adapter import Adapter
from worker.residency import LOAD_ERRORS, BaseModels, ResidentModel, SamplingAdapters

log = structlog.get_logger()

POLL_S = 1.0


@dataclass(eq=False)
class ClaimedSample:
    """A sample this worker draws; `body` and `model` are None when it cannot be drawn, and `failure` says why."""

    operation: Operation
    session: SamplingSession
    body: Sample | None = None
    model: ResidentModel | None = None
    adapter: Adapter | None = None
    failure: Failure | None = None
    device_ns: int = 0


@dataclass(frozen=True)
class SampleReport:
    """What one step consumed, in nanoseconds: per account, in all, and what of it all is not billed."""

    device_ns: dict[str, int]
    busy_ns: int
    overhead_ns: int


class SampleTurn:
    """The samples in the engine. On the engine's thread."""

    def __init__(self, committer: Committer, *, worker_id: str, device: str) -> None:
        self._committer = committer
        self._worker_id = worker_id
        self._device = device
        self._claimed: dict[str, ClaimedSample] = {}

    def __len__(self) -> int:
        return len(self._claimed)

    def accounts(self) -> set[str]:
        """Whose samples are in the engine."""
        return {claimed.operation.account_id for claimed in list(self._claimed.values())}

    def operation_ids(self) -> list[int]:
        """The journal's rows of what is claimed."""
        return [claimed.operation.id for claimed in list(self._claimed.values())]

    def model_of(self, account_id: str) -> ResidentModel:
        """The model of one of an account's samples: the oldest."""
        return next(
            claimed.model
            for claimed in self._claimed.values()
            if claimed.operation.account_id == account_id and claimed.model is not None
        )

    def models_in_use(self) -> set[str]:
        """Base models that samples are drawn from."""
        return {claimed.session.base_model for claimed in list(self._claimed.values())}

    def admit(self, arrived: Sequence[ClaimedSample]) -> None:
        """Give samples to their model's sampler; what cannot be drawn is committed as failed."""
        failed = [claimed for claimed in arrived if claimed.failure is not None]
        for claimed in arrived:
            if claimed.failure is None and claimed.model is not None and claimed.body is not None:
                self._submit(claimed.model, claimed, claimed.body)
        if failed:
            self._committer.commit_samples(
                [self._commit_of(claimed, claimed.failure) for claimed in failed if claimed.failure is not None]
            )

    def _submit(self, model: ResidentModel, claimed: ClaimedSample, body: Sample) -> None:
        """Begin a sample; one whose claim had expired and is ours again starts over, as the new attempt."""
        request_id = claimed.operation.request_id
        if request_id in self._claimed:
            model.sampler.cancel(request_id)
        self._claimed[request_id] = claimed
        model.sampler.submit(request_id, body, claimed.adapter)

    def take(self, model: ResidentModel) -> SampleReport:
        """One step of a model's sampler: every sequence in it moves on by a token or a part of its prompt."""
        try:
            step = model.sampler.step()
        except Exception as error:
            return self._give_up(model, error)
        *shares, overhead_ns = split_ns(step.device_ns, [*step.work.values(), step.overhead])
        per_account: dict[str, int] = {}
        for request_id, share in zip(step.work, shares, strict=True):
            claimed = self._claimed[request_id]
            claimed.device_ns += share
            account = claimed.operation.account_id
            per_account[account] = per_account.get(account, 0) + share
        commits = []
        for finished in step.finished:
            claimed = self._claimed.pop(finished.request_id)
            tokens = (finished.tokens_prefilled, finished.tokens_cached, finished.tokens_sampled)
            commits.append(self._commit_of(claimed, finished.outcome, *tokens))
            overhead_ns += claimed.device_ns if isinstance(finished.outcome, Failure) else 0
        if commits:
            self._committer.commit_samples(commits)
        return SampleReport(per_account, step.device_ns, overhead_ns)

    def _give_up(self, model: ResidentModel, error: Exception) -> SampleReport:
        """Fail what was in a step that could not be computed; nothing of it is billed."""
        log.exception("sampling_step_failed", base_model=model.base.name)
        broken = [claimed for claimed in self._claimed.values() if claimed.model is model]
        failure = Failure(f"the sample could not be computed: {error}", Category.SERVER)
        for claimed in broken:
            model.sampler.cancel(claimed.operation.request_id)
            del self._claimed[claimed.operation.request_id]
        self._committer.commit_samples([self._commit_of(claimed, failure) for claimed in broken])
        return SampleReport({}, 0, sum(claimed.device_ns for claimed in broken))

    def _commit_of(
        self, claimed: ClaimedSample, outcome: Outcome, prefilled: int = 0, cached: int = 0, sampled: int = 0
    ) -> SampleCommit:
        usage = Usage(
            device=self._device,
            device_ns=claimed.device_ns,
            attempt=claimed.operation.attempts,
            worker_id=self._worker_id,
            tokens_prefilled=prefilled,
            tokens_cached=cached,
            tokens_sampled=sampled,
        )
        return SampleCommit(claimed.operation, claimed.session, outcome, usage)


class SampleFeeder(threading.Thread):
    """Claims queued samples, as many as the engine has room for, and brings what they need into memory."""

    def __init__(
        self,
        storage: Storage,
        models: BaseModels,
        adapters: SamplingAdapters,
        *,
        worker_id: str,
        claim_s: float,
        room: Callable[[], int],
        in_use: Callable[[], set[str]],
        deliver: Callable[[Sequence[ClaimedSample]], None],
    ) -> None:
        super().__init__(name="samples", daemon=True)
        self._storage = storage
        self._models = models
        self._adapters = adapters
        self._worker_id = worker_id
        self._claim_s = claim_s
        self._room = room
        self._in_use = in_use
        self._deliver = deliver
        self._wanted = threading.Event()
        self._stopping = threading.Event()

    def notify(self) -> None:
        """Samples may be queued, or there is room again."""
        self._wanted.set()

    def stop(self) -> None:
        """Claim no more, and end."""
        self._stopping.set()
        self._wanted.set()
        self.join()

    def run(self) -> None:
        """Claim until stopped; also looks by itself now and then, so that no lost message stalls samples."""
        while not self._stopping.is_set():
            self._wanted.wait(POLL_S)
            self._wanted.clear()
            try:
                while not self._stopping.is_set() and self._feed():
                    pass
            except DatabaseUnavailableError as error:
                log.warning("claiming_failed", error=str(error))
            except Exception:  # whatever was claimed is released when the claims expire
                log.exception("claiming_failed")

    def _feed(self) -> bool:
        room = self._room()
        if room <= 0:
            return False
        database = self._storage.database
        with database.read() as tx:
            if not journal.samples_wait(tx):
                return False
        with database.begin() as tx:
            claimed = journal.claim_samples(
                tx,
                worker_id=self._worker_id,
                limit=room,
                now=database.now(tx),
                expires_at=database.after(tx, self._claim_s),
                skip_locked=not database.is_sqlite,
            )
        self._deliver([self._load(operation) for operation in claimed])
        return bool(claimed)

    def _load(self, operation: Operation) -> ClaimedSample:
        with self._storage.database.read() as tx:
            session = runs.get_sampling_session(tx, str(operation.sampling_session_id))
        try:
            body = operations.decode(self._storage.payloads.get(operation.payload))
            model = self._models.get(session.base_model, in_use=self._in_use())
            adapter = self._adapters.get(session, model.base)
        except (*LOAD_ERRORS, ValueError) as error:
            log.warning("sample_unloadable", request=operation.request_id, error=str(error))
            return ClaimedSample(operation, session, failure=Failure(str(error), Category.SERVER))
        return ClaimedSample(operation, session, body, model, adapter)
