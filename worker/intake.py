"""What the Celery tasks call: brings a run into the engine, or wakes it there, and waits until it has nothing to do.

However long it takes to fetch a run's state, or a base model, a task waits no longer than its slice.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from datetime import datetime

import structlog

from billing import pauses
from jobs.dispatch import Announces
from storage import replays, suspects
from storage.errors import LeaseLostError, RowNotFoundError
from storage.leases import Lease
from storage.open import Storage
from storage.retry import retrying
from storage.runs import Run
from worker import takeover
from worker.loop import EngineLoop
from worker.residency import BaseModels
from worker.settings import WorkerSettings
from worker.takeover import Takeover

log = structlog.get_logger()


class RunIntake:
    """Takes runs over, as many at once as the roster has room for. Called by many threads at once, computes nothing."""

    def __init__(
        self,
        storage: Storage,
        engine: EngineLoop,
        models: BaseModels,
        dispatcher: Announces[object],
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
        self._taking: set[str] = set()

    def advance(self, run_id: str, *, expires_at: datetime) -> None:
        """See to it that a run's operations are executed; returns when they are, or when the slice is over.

        Args:
            expires_at: by the database's clock; a run that is not here is left alone from then on.
        """
        with self._lock:
            if run_id in self._attended and self._engine.roster.notify(run_id):
                return  # another task waits for it already
            self._attended[run_id] = self._attended.get(run_id, 0) + 1
        try:
            done = self._attend(run_id, expires_at)
        finally:
            with self._lock:
                self._attended[run_id] -= 1
                if not self._attended[run_id]:
                    del self._attended[run_id]
        if not done:
            self._dispatcher.announce_run(run_id)

    def _attend(self, run_id: str, expires_at: datetime) -> bool:
        slice_ends_at = time.monotonic() + self._settings.slice_s
        if not self._engine.roster.notify(run_id):
            if self._is_let_be(run_id, expires_at):
                return True
            with self._alone(run_id) as alone:
                if not alone:
                    return True  # whoever takes it over reads its operations afterwards
                if not self._engine.roster.notify(run_id):
                    with self._engine.roster.room(timeout_s=self._settings.slice_s) as has_room:
                        if not has_room:
                            return False
                        if not self._take_over(run_id):
                            return True
        return self._engine.wait_idle(run_id, timeout_s=slice_ends_at - time.monotonic())

    @contextlib.contextmanager
    def _alone(self, run_id: str) -> Iterator[bool]:
        """Whether no other task is about to take this run over: of many messages at once one is enough."""
        with self._lock:
            alone = run_id not in self._taking
            self._taking.add(run_id)
        try:
            yield alone
        finally:
            if alone:
                with self._lock:
                    self._taking.discard(run_id)

    def _is_let_be(self, run_id: str, expires_at: datetime) -> bool:
        """Whether the message is too old, or a cap pauses the run: the sweeper announces it when there is room."""
        with self._storage.database.read() as tx:
            now = self._storage.database.now(tx)
            return now > expires_at or bool(pauses.waiting_runs(tx, [run_id], now=now))

    def _take_over(self, run_id: str) -> bool:
        """Take a run's lease and begin to fetch it; False if it is not to be had."""
        taken = self._acquire(run_id)
        if taken is None:
            return False
        run, lease = taken
        self._engine.roster.expect(run, lease)
        try:
            threading.Thread(target=self._bring, args=(run, lease), name="fetch", daemon=True).start()
        except RuntimeError as error:  # no more threads, as with memory: there are some later, or on another worker
            self._engine.roster.forget(lease, MemoryError(str(error)))
            takeover.give_up(self._storage, lease)
            return False
        return True

    def _acquire(self, run_id: str) -> tuple[Run, Lease] | None:
        if self._engine.roster.pauses(run_id):
            return None  # the sweeper announces it again
        try:
            return takeover.acquire(self._storage, run_id, worker_id=self._worker_id, lease_s=self._settings.lease_s)
        except RowNotFoundError:
            return None
        except LeaseLostError as error:
            log.info("run_is_elsewhere", run=run_id, holder=error.holder)
            self._dispatcher.announce_run(run_id)
            return None

    def _bring(self, run: Run, lease: Lease) -> None:
        """Fetch a run for the engine; one that cannot be fetched is given up, and announced again by the sweeper."""
        try:
            fetched = self._fetch(run, lease)
            log.info("run_fetched", run=run.id, worker=self._worker_id, operations=len(fetched.tail))
            self._engine.roster.arrive(fetched)
        except Exception as error:
            log.warning(
                "takeover_failed", run=run.id, error=str(error), exc_info=not getattr(error, "retryable", False)
            )
            self._engine.roster.forget(lease, error)
            retrying(lambda: takeover.give_up(self._storage, lease))

    def _fetch(self, run: Run, lease: Lease) -> Takeover:
        reason = self._engine.roster.hopeless(lease)
        if suspects.is_condemned(run.replay_blame):
            reason = replays.sentence(run.replay_blame)
        if reason is not None:
            return takeover.without_state(run, lease, reason=reason)
        in_use = self._engine.models_in_use()
        return takeover.fetch(self._storage, self._models, run, lease, in_use=in_use)
