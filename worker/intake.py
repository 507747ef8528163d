"""What the Celery tasks call: brings a run into the engine, or wakes it there, and waits until it has nothing to do."""

from __future__ import annotations

import threading

import structlog

from jobs.dispatch import Dispatcher
from storage.errors import LeaseLostError, RowNotFoundError
from storage.leases import Lease
from storage.open import Storage
from storage.runs import Run
from worker import takeover
from worker.loop import EngineLoop
from worker.residency import BaseModels
from worker.settings import WorkerSettings
from worker.takeover import Takeover

log = structlog.get_logger()


class RunIntake:
    """Takes runs over. Called by many threads at once, computes nothing."""

    def __init__(
        self,
        storage: Storage,
        engine: EngineLoop,
        models: BaseModels,
        dispatcher: Dispatcher,
        settings: WorkerSettings,
        *,
        worker_id: str,
    ) -> None:
        self._storage = storage
        self._engine = engine
        self._models = models
        self._dispatcher = dispatcher
        self._settings = settings
        self._worker_id = worker_id
        self._lock = threading.Lock()
        self._attended: dict[str, int] = {}

    def advance(self, run_id: str) -> None:
        """See to it that a run's operations are executed; returns when they are, or when the slice is over."""
        with self._lock:
            if run_id in self._attended and self._engine.roster.notify(run_id):
                return  # another task waits for it already
            self._attended[run_id] = self._attended.get(run_id, 0) + 1
        try:
            done = self._attend(run_id)
        finally:
            with self._lock:
                self._attended[run_id] -= 1
                if not self._attended[run_id]:
                    del self._attended[run_id]
        if not done:
            self._dispatcher.announce_run(run_id)

    def _attend(self, run_id: str) -> bool:
        if not self._engine.roster.notify(run_id) and not self._take_over(run_id):
            return True
        return self._engine.wait_idle(run_id, timeout_s=self._settings.slice_s)

    def _take_over(self, run_id: str) -> bool:
        roster = self._engine.roster
        if roster.pauses(run_id):
            return False  # the sweeper announces it again
        try:
            run, lease = takeover.acquire(
                self._storage, run_id, worker_id=self._worker_id, lease_s=self._settings.lease_s
            )
        except RowNotFoundError:
            return False
        except LeaseLostError as error:
            log.info("run_is_elsewhere", run=run_id, holder=error.holder)
            self._dispatcher.announce_run(run_id)
            return False
        roster.expect(run, lease)
        try:
            roster.arrive(self._fetch(run, lease))
        except Exception as error:
            roster.forget(lease, error)
            takeover.give_up(self._storage, lease)
            raise
        return True

    def _fetch(self, run: Run, lease: Lease) -> Takeover:
        reason = self._engine.roster.hopeless(run.id)
        if reason is not None:
            return takeover.without_state(run, lease, reason=reason)
        in_use = self._engine.models_in_use()
        return takeover.fetch(self._storage, self._models, run, lease, in_use=in_use)
