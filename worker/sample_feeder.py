"""Claims queued samples, as many as the engine has room for, and brings what they need into memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import structlog

from jobs import operations
from jobs.operations import Category, Failure
from storage import failpoints, journal, runs
from storage.failpoints import Point
from storage.journal import Operation
from storage.open import Storage
from worker.residency import BaseModels, SamplingAdapters
from worker.sample_turn import ClaimedSample, Drawable, SampleTurn

log = structlog.get_logger()

POLL_S = 1.0


class SampleFeeder(threading.Thread):
    """A thread between journal and engine. It also looks by itself now and then, so no lost message stalls samples."""

    def __init__(
        self,
        storage: Storage,
        models: BaseModels,
        adapters: SamplingAdapters,
        samples: SampleTurn,
        *,
        worker_id: str,
        claim_s: float,
        samples_max: int,
        in_use: Callable[[], set[str]],
    ) -> None:
        super().__init__(name="samples", daemon=True)
        self._storage = storage
        self._models = models
        self._adapters = adapters
        self._samples = samples
        self._worker_id = worker_id
        self._claim_s = claim_s
        self._samples_max = samples_max
        self._in_use = in_use
        self._wanted = threading.Event()
        self._stopping = threading.Event()

    def notify(self) -> None:
        """Samples may be queued, or there is room again."""
        self._wanted.set()

    def stop(self) -> None:
        """Claim no more. What has been claimed and is not in the engine is given up with all other claims."""
        self._stopping.set()
        self._wanted.set()

    def run(self) -> None:
        """Claim until stopped."""
        while not self._stopping.is_set():
            self._wanted.wait(POLL_S)
            self._wanted.clear()
            try:
                while not self._stopping.is_set() and self._feed():
                    pass
            except Exception as error:  # what was claimed is free again once its claim expires
                log.warning("claiming_failed", error=str(error), exc_info=not getattr(error, "retryable", False))
                self._stopping.wait(POLL_S)

    def _feed(self) -> bool:
        room = self._samples_max - len(self._samples)
        if room <= 0 or not self._any_waiting():
            return False
        failpoints.reach(Point.CLAIM_BEGUN)
        claimed = self._claim(room)
        failpoints.reach(Point.CLAIMED)
        self._samples.expect(claimed)
        try:
            for operation in claimed:
                self._samples.arrive(self._load(operation))
        finally:
            self._samples.forget(claimed)
        return bool(claimed)

    def _any_waiting(self) -> bool:
        with self._storage.database.read() as tx:
            return journal.samples_wait(tx)

    def _claim(self, limit: int) -> Sequence[Operation]:
        database = self._storage.database
        with database.begin() as tx:
            return journal.claim_samples(
                tx,
                worker_id=self._worker_id,
                limit=limit,
                now=database.now(tx),
                expires_at=database.after(tx, self._claim_s),
                skip_locked=not database.is_sqlite,
            )

    def _load(self, operation: Operation) -> ClaimedSample:
        """Bring a sample into memory; whatever is wrong with it is its own failure, unless trying again may help."""
        with self._storage.database.read() as tx:
            session = runs.get_sampling_session(tx, str(operation.sampling_session_id))
        try:
            body = operations.decode(self._storage.payloads.get(operation.payload))
            model = self._models.get(session.base_model, in_use=self._in_use())
            return ClaimedSample(operation, session, Drawable(body, model, self._adapters.get(session, model.base)))
        except Exception as error:
            if getattr(error, "retryable", False):
                raise
            log.warning("sample_unloadable", request=operation.request_id, error=str(error))
            return ClaimedSample(operation, session, Failure(str(error), Category.SERVER))
