"""The engine's thread: one turn after the other, training or sampling, for whoever has had the least device time.

Other threads only hand in (`hand_in_run`, `deliver_samples`, `notify_run`) and wait; all computing, and every change of
a run's state, happens here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import structlog

from jobs import operations
from jobs.operations import Body
from storage import journal, leases, workers
from storage.errors import DatabaseUnavailableError, StorageError
from storage.journal import Operation, Status
from storage.leases import Lease
from storage.open import Storage
from worker.active_run import ActiveRun, Queued
from worker.commit import retrying
from worker.fairness import Activity, Claimant, FairShare
from worker.sample_turn import ClaimedSample, SampleReport, SampleTurn
from worker.settings import WorkerSettings
from worker.takeover import Takeover, replay
from worker.train_turn import TrainTurn, TurnReport
from worker.writeback import WriteBack, write_snapshot

log = structlog.get_logger()

IDLE_WAIT_S = 0.25
FETCHED_MOST = 64


class EngineLoop(threading.Thread):
    """Orders turns; deciding and computing are elsewhere.

    Attributes:
        progress_at: monotonic time of the last sign of life, for the watchdog.
    """

    def __init__(
        self,
        storage: Storage,
        settings: WorkerSettings,
        train: TrainTurn,
        samples: SampleTurn,
        *,
        worker_id: str,
        io: ThreadPoolExecutor,
        on_room: Callable[[], None],
    ) -> None:
        super().__init__(name="engine", daemon=True)
        self._storage = storage
        self._settings = settings
        self._train = train
        self._samples = samples
        self._worker_id = worker_id
        self._io = io
        self._on_room = on_room
        self._fair = FairShare()
        self._lock = threading.Lock()
        self._wakeup = threading.Event()
        self._draining = threading.Event()
        self._runs: dict[str, ActiveRun] = {}
        self._expected: dict[str, Lease] = {}
        self._arrived_runs: list[Takeover] = []
        self._arrived_samples: list[ClaimedSample] = []
        self._busy_ns = 0
        self._overhead_ns = 0
        self._writeback = WriteBack(storage, interval_s=settings.writeback_s, wake=self._wakeup.set)
        self.progress_at = time.monotonic()

    # ------------------------------------------------------------------------------------------- from other threads

    def notify_run(self, run_id: str) -> bool:
        """Say that a run may have more operations; False if it is not in memory."""
        with self._lock:
            run = self._runs.get(run_id)
            if run is None or run.void:
                return False
            run.may_have_more = True
            run.idle.clear()
        self._wakeup.set()
        return True

    def expect_run(self, lease: Lease) -> None:
        """Keep a lease whose run is being fetched."""
        with self._lock:
            self._expected[lease.run_id] = lease

    def forget_run(self, lease: Lease) -> None:
        """Keep it no longer: the run could not be fetched."""
        with self._lock:
            self._expected.pop(lease.run_id, None)

    def hand_in_run(self, takeover: Takeover) -> None:
        """Give a run whose lease this worker has taken."""
        with self._lock:
            self._expected.pop(takeover.run.id, None)
            self._arrived_runs.append(takeover)
        self._wakeup.set()

    def deliver_samples(self, claimed: Sequence[ClaimedSample]) -> None:
        """Give samples that this worker has claimed."""
        with self._lock:
            self._arrived_samples.extend(claimed)
        self._wakeup.set()

    def wait_idle(self, run_id: str, *, timeout_s: float) -> bool:
        """Wait until nothing is left to do for a run; False if time ran out first, or the worker is leaving."""
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0 and not self._draining.is_set():
            with self._lock:
                run = self._runs.get(run_id)
                arriving = any(takeover.run.id == run_id for takeover in self._arrived_runs)
            if run is None and not arriving:
                return True
            if run is not None and run.idle.wait(min(left_s, IDLE_WAIT_S)):
                return True
            if run is None:
                time.sleep(min(left_s, 0.01))
        return False

    def num_samples(self) -> int:
        """Samples in the engine or on their way to it."""
        with self._lock:
            return len(self._samples) + len(self._arrived_samples)

    def models_in_use(self) -> set[str]:
        """Base models that must stay in memory."""
        with self._lock:
            arriving = {takeover.run.base_model for takeover in self._arrived_runs}
            arriving |= {claimed.session.base_model for claimed in self._arrived_samples}
            return arriving | {run.run.base_model for run in self._runs.values()} | self._samples.models_in_use()

    def renew(self) -> None:
        """Extend leases and claims, and note the runs that were lost. Called by the keeper, not by the engine."""
        with self._lock:
            held = [run for run in self._runs.values() if not run.void]
            arriving = [*self._expected.values(), *(takeover.lease for takeover in self._arrived_runs)]
            claimed = self._samples.operation_ids() + [sample.operation.id for sample in self._arrived_samples]
        database = self._storage.database
        with database.begin() as tx:
            expires_at = database.after(tx, self._settings.lease_s)
            kept = set(leases.renew(tx, [*(run.lease for run in held), *arriving], expires_at=expires_at))
            journal.renew_claims(tx, claimed, worker_id=self._worker_id, expires_at=expires_at)
            workers.record_seen(tx, self._worker_id, now=database.now(tx))
        for run in held:
            if run.id not in kept:
                log.warning("lease_lost", run=run.id, epoch=run.lease.epoch)
                run.void = True

    def drain(self) -> None:
        """Begin no further turn; `join` then waits until everything has been written back and handed over."""
        self._draining.set()
        self._wakeup.set()

    # --------------------------------------------------------------------------------------------------- the thread

    def run(self) -> None:
        """Take turns until drained."""
        try:
            while not self._draining.is_set():
                self.progress_at = time.monotonic()
                if not self._turn():
                    self._wakeup.wait(IDLE_WAIT_S)
                    self._wakeup.clear()
            self._hand_over()
        except Exception:
            log.exception("engine_failed")
            raise

    def _turn(self) -> bool:
        """One turn; False if there was nothing to do."""
        self._admit()
        self._refill()
        worked = self._take_turn()
        self._store_busy()
        for run in self._active():
            self._writeback.offer(run)
        self._evict()
        return worked

    def _admit(self) -> None:
        with self._lock:
            arrived_runs, self._arrived_runs = self._arrived_runs, []
            arrived_samples, self._arrived_samples = self._arrived_samples, []
        for takeover in arrived_runs:
            self._begin(takeover)
        if arrived_samples:
            self._samples.admit(arrived_samples)

    def _begin(self, takeover: Takeover) -> None:
        started = time.perf_counter_ns()
        try:
            run = replay(self._storage, takeover)
        except Exception:
            log.exception("replay_failed", run=takeover.run.id)
            retrying(lambda: self._release(takeover.lease))
            return
        if takeover.tail:
            spent = time.perf_counter_ns() - started
            self._busy_ns += spent
            self._overhead_ns += spent
        with self._lock:
            self._runs[run.id] = run

    def _refill(self) -> None:
        """Fetch operations of runs that may have more."""
        wanting = [run for run in self._active() if run.may_have_more and len(run.queue) < FETCHED_MOST // 2]
        if not wanting:
            return
        try:
            with self._storage.database.read() as tx:
                for run in wanting:
                    run.may_have_more = False  # before the read: a notice that comes during it counts
                    following = journal.next_in_order(tx, run.id, after_seq=run.fetched_seq, limit=FETCHED_MOST)
                    run.may_have_more |= len(following) == FETCHED_MOST
                    run.queue.extend(self._io.map(self._fetch, following))
        except StorageError as error:
            log.warning("fetch_failed", error=str(error))
            for run in wanting:
                run.may_have_more = True

    def _fetch(self, operation: Operation) -> Queued:
        if operation.status not in (Status.QUEUED, Status.RUNNING):
            return Queued(operation, None)
        body: Body = operations.decode(self._storage.payloads.get(operation.payload))
        return Queued(operation, body)

    def _take_turn(self) -> bool:
        ready = [run for run in self._active() if run.is_ready]
        waiting: set[Claimant] = {(run.run.account_id, Activity.TRAINING) for run in ready}
        waiting |= {(account, Activity.SAMPLING) for account in self._samples.accounts()}
        if not waiting:
            return False
        order = self._fair.order(waiting)
        account, activity = order[0]
        if activity is Activity.SAMPLING:
            report = self._samples.take(self._samples.model_of(account))
            self._charge(Activity.SAMPLING, report)
            self._on_room()
            return True
        return self._train_together(ready, [name for name, kind in order if kind is Activity.TRAINING])

    def _train_together(self, ready: Sequence[ActiveRun], accounts: Sequence[str]) -> bool:
        by_fairness = sorted(ready, key=lambda run: (accounts.index(run.run.account_id), run.used_at))
        model = by_fairness[0].model
        together = [run for run in by_fairness if run.model is model]
        report = self._train.take(together, tokens_max=self._settings.tokens_max)
        for run in together:
            run.used_at = time.monotonic()
        if report is None:
            return False
        self._charge(Activity.TRAINING, report)
        return True

    def _charge(self, activity: Activity, report: TurnReport | SampleReport) -> None:
        for account, consumed in report.device_ns.items():
            self._fair.charge((account, activity), consumed)
        self._busy_ns += report.busy_ns
        self._overhead_ns += report.overhead_ns

    def _store_busy(self) -> None:
        if self._busy_ns == 0:
            return
        try:
            with self._storage.database.begin() as tx:
                workers.add_busy(tx, self._worker_id, busy_ns=self._busy_ns, overhead_ns=self._overhead_ns)
        except DatabaseUnavailableError:
            return  # added at the next turn
        self._busy_ns = self._overhead_ns = 0

    def _active(self) -> list[ActiveRun]:
        with self._lock:
            return [run for run in self._runs.values() if not run.void]

    # ------------------------------------------------------------------------------------------------ leaving memory

    def _evict(self) -> None:
        """Let go of runs that are void, cold or too many; their state is written back first."""
        now = time.monotonic()
        with self._lock:
            for run in [run for run in self._runs.values() if run.void and not run.writing]:
                del self._runs[run.id]
                run.idle.set()
            for run in self._runs.values():
                if run.is_idle:
                    run.idle.set()
            idle = [run for run in self._runs.values() if run.is_idle and not run.is_dirty and not run.writing]
            surplus = len(self._runs) - self._settings.run_states_max
            cold = [
                run
                for place, run in enumerate(sorted(idle, key=lambda run: run.used_at))
                if place < surplus or now - run.used_at > self._settings.warm_s
            ]
            for run in cold:
                del self._runs[run.id]
        for run in cold:
            retrying(lambda run=run: self._release(run.lease))  # type: ignore[misc]
            log.info("run_parked", run=run.id, seq=run.state_seq)

    def _release(self, lease: Lease) -> None:
        with self._storage.database.begin() as tx:
            leases.release(tx, lease)

    def _hand_over(self) -> None:
        """Write every state back, and give leases and claims up."""
        self._writeback.close()
        for run in self._active():
            if run.is_dirty and run.state is not None:
                data, seq = run.state.serialize(), run.state_seq
                try:
                    write_snapshot(self._storage, run.lease, seq, data)
                except StorageError as error:  # the next worker replays a longer tail
                    log.warning("writeback_failed", run=run.id, seq=seq, error=str(error))
            self._release(run.lease)
        for lease in [*self._expected.values(), *(takeover.lease for takeover in self._arrived_runs)]:
            self._release(lease)
        with self._storage.database.begin() as tx:
            journal.release_claims(tx, now=self._storage.database.now(tx), worker_id=self._worker_id)
        log.info("handed_over", runs=len(self._runs))
