"""The engine's thread: one turn after the other, training or sampling, for whoever has had the least device time.

Other threads only hand in and wait (`roster.py`, `sample_turn.py`); all computing, and every change of a run's state,
happens here.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import structlog
from sqlalchemy import Connection

from storage import claims, failpoints, leases, replays, runs, workers
from storage.errors import DatabaseUnavailableError, StorageError
from storage.failpoints import Point
from storage.leases import Lease
from storage.open import Storage
from storage.retry import retrying
from worker import faults
from worker.active_run import ActiveRun
from worker.fairness import Activity, Claimant, FairShare
from worker.fetching import OperationFetcher
from worker.replay import Replay
from worker.replay_tail import RecentPercentile
from worker.roster import Roster
from worker.sample_turn import SampleTurn
from worker.settings import WorkerSettings
from worker.takeover import Takeover
from worker.train_turn import TrainTurn
from worker.work_meter import WorkMeter
from worker.writeback import WriteBack

log = structlog.get_logger()

IDLE_WAIT_S = 0.25


class EngineLoop(threading.Thread):
    """Orders turns; deciding and computing are elsewhere.

    Attributes:
        roster: the runs this worker holds.
        progress_at: monotonic time of the last sign of life, for the watchdog.
        is_cut_off: the thread has ended because database or object store refused it.
    """

    def __init__(
        self,
        storage: Storage,
        settings: WorkerSettings,
        train: TrainTurn,
        samples: SampleTurn,
        meter: WorkMeter,
        *,
        worker_id: str,
        on_room: Callable[[], None],
    ) -> None:
        super().__init__(name="engine", daemon=True)
        self._storage = storage
        self._settings = settings
        self._train = train
        self._samples = samples
        self._worker_id = worker_id
        self._on_room = on_room
        self._fair = FairShare()
        self._wakeup = threading.Event()
        self._draining = threading.Event()
        self._fetcher = OperationFetcher(storage)
        self._writeback = WriteBack(
            storage,
            interval_s=settings.writeback_s,
            idle_s=settings.warm_s,
            tail_max_s=settings.replay_tail_s,
            wake=self._wakeup.set,
        )
        self._replays: deque[Replay] = deque()
        self._tails = RecentPercentile()
        self._meter = meter
        meter.tail_p95_ns = lambda: self._tails.p95
        self.roster = Roster(self._wakeup.set, fetched_max=settings.concurrency, expected_max=settings.run_states_max)
        self.progress_at = time.monotonic()
        self.is_cut_off = False
        train.wake_after_io(self._wakeup.set)
        train.report_progress(self._note_progress)
        samples.wake_on_arrival(self._wakeup.set)

    # ------------------------------------------------------------------------------------------- from other threads

    def wait_idle(self, run_id: str, *, timeout_s: float) -> bool:
        """Wait until nothing is left to do for a run; False if time ran out first, or the worker is leaving."""
        return self.roster.wait_idle(run_id, timeout_s=timeout_s, leaving=self._draining)

    def models_in_use(self) -> set[str]:
        """Base models that must stay in memory."""
        return self.roster.base_models() | self._samples.models_in_use()

    def renew(self) -> None:
        """Extend leases and claims, and note those that were lost. Called by the keeper, not by the engine."""
        asked, claimed = self.roster.leases(), self._samples.claims()
        database = self._storage.database
        with database.begin() as tx:
            expires_at = database.after(tx, self._settings.lease_s)
            kept = set(leases.renew(tx, asked, expires_at=expires_at))
            claims.renew_claims(tx, list(claimed), worker_id=self._worker_id, expires_at=expires_at)
            standing = claims.standing_claims(tx, list(claimed), worker_id=self._worker_id)
            silent_since = database.after(tx, -self._settings.client_silent_s)
            alone = runs.without_client(tx, [lease.run_id for lease in asked], silent_since=silent_since)
            workers.record_seen(tx, self._worker_id, now=database.now(tx))
        failpoints.reach(Point.LEASES_RENEWED)
        self.roster.note_without_client(alone)
        for lease in self.roster.drop_all_but(kept, asked):
            log.warning("lease_lost", run=lease.run_id, epoch=lease.epoch)
        self._samples.note_lost([claimed[operation_id] for operation_id in claimed if operation_id not in standing])

    @property
    def stuck_s(self) -> float:
        """For how long the engine has made no progress."""
        return time.monotonic() - self.progress_at

    @property
    def is_draining(self) -> bool:
        """Whether the worker is leaving."""
        return self._draining.is_set()

    def drain(self) -> None:
        """Begin no further turn; `join` then waits until everything has been written back and handed over."""
        self._draining.set()
        self._wakeup.set()

    # --------------------------------------------------------------------------------------------------- the thread

    def run(self) -> None:
        """Take turns until drained."""
        try:
            while not self._draining.is_set():
                self._note_progress()
                if not self._turn():
                    self._wakeup.wait(IDLE_WAIT_S)
                    self._wakeup.clear()
            self._hand_over()
        except Exception as error:
            self.is_cut_off = isinstance(error, StorageError)
            log.exception("engine_failed")
            raise

    def _note_progress(self) -> None:
        self.progress_at = time.monotonic()

    def _turn(self) -> bool:
        """One turn; False if there was nothing to do."""
        for takeover in self.roster.take_arrived():
            self._begin(takeover)
        self._drop_overtaken()
        is_alone = self._replays_alone()
        if not is_alone and self._samples.admit():
            self._on_room()
        self._fetcher.refill(self.roster.active())
        replayed = self._replay_some(is_alone=is_alone)
        worked = not is_alone and self._take_turn()
        self._store_work()
        self._writeback.offer(self.roster.active())
        self._park()
        return worked or replayed

    def _begin(self, takeover: Takeover) -> None:
        settings = self._settings
        replay = Replay(
            takeover,
            self._meter.clock,
            tokens_max=settings.tokens_max,
            bound=settings.replay_bound,
            on_pass=self._note_progress,
        )
        self._meter.work.num_damaged_snapshots += len(takeover.damaged)
        if replay.is_done:
            self._admit(replay)
        else:
            self._replays.append(replay)

    def _replay_some(self, *, is_alone: bool) -> bool:
        """A step of the replay that has waited longest; False if there is none. Others have their turns in between."""
        if not self._replays:
            return False
        replay = self._replays[0]
        if replay.takeover.run.replays_alone and not is_alone:
            return False
        self._write_down(replay)
        is_short_of_memory = False
        before = replay.num_replayed, replay.num_mismatches
        try:
            with self._meter.clock.measure() as measured:
                replay.advance()
        except Exception as error:
            faults.raise_if_device_is_lost(error)
            is_short_of_memory = faults.is_out_of_memory(error)
            if not (is_short_of_memory and replay.go_alone()):
                self._replays.popleft()
                log.exception("replay_failed", run=replay.takeover.run.id)
                self.roster.forget(replay.takeover.lease, error)
                retrying(lambda: self._release(replay.takeover.lease), on_wait=self._note_progress)
        finally:
            self._meter.waste(measured.device_ns)
            self._meter.work.num_replayed += replay.num_replayed - before[0]
            self._meter.work.num_replay_mismatches += replay.num_mismatches - before[1]
        if is_short_of_memory and replay.takeover.model is not None:
            # not before the exception is gone: it holds the pass's tensors
            faults.free_unused_memory(replay.takeover.model.base.device)
        if self._replays and self._replays[0] is replay and replay.is_done:
            self._replays.popleft()
            self._admit(replay)
        return True

    def _drop_overtaken(self) -> None:
        for replay in [one for one in self._replays if not self.roster.expects(one.takeover.lease)]:
            self._replays.remove(replay)
            log.warning("takeover_overtaken", run=replay.takeover.run.id, epoch=replay.takeover.lease.epoch)

    def _replays_alone(self) -> bool:
        """Whether a worker died with the run that is replayed next: nobody has a turn until it is whole.

        Its replay begins once nothing is being fetched any more; until then others have theirs.
        """
        return bool(self._replays) and self._replays[0].takeover.run.replays_alone and not self.roster.is_fetching

    def _write_down(self, replay: Replay) -> None:
        """Say whose replay it was, should this worker not survive it."""
        if not replay.is_written_down:
            retrying(lambda: self._record(replays.begin, replay), on_wait=self._note_progress)
            replay.is_written_down = True

    def _record(self, record: Callable[[Connection, Lease], None], replay: Replay) -> None:
        with self._storage.database.begin() as tx:
            record(tx, replay.takeover.lease)

    def _admit(self, replay: Replay) -> None:
        is_whole = replay.takeover.model is not None
        if is_whole and (replay.is_written_down or replay.takeover.run.replays_alone):
            retrying(lambda: self._record(replays.end, replay), on_wait=self._note_progress)
        run = replay.finish()
        if not self.roster.admit(run):
            log.warning("takeover_overtaken", run=run.id, epoch=run.lease.epoch)
            return
        log.info("run_ready", run=run.id, worker=self._worker_id, seq=run.state_seq)

    def _take_turn(self) -> bool:
        ready = [run for run in self.roster.active() if run.is_ready and not self._writeback.holds(run)]
        waiting: set[Claimant] = {(run.run.account_id, Activity.TRAINING) for run in ready}
        waiting |= {(account, Activity.SAMPLING) for account in self._samples.accounts()}
        order = self._fair.order(waiting)
        for place, (account, activity) in enumerate(order):
            if activity is Activity.SAMPLING:
                self._charge(activity, self._samples.take(self._samples.model_of(account)))
                self._on_room()
                return True
            accounts = [name for name, kind in order[place:] if kind is Activity.TRAINING]
            if self._train_together([run for run in ready if run.run.account_id in accounts], accounts):
                return True
        return False

    def _train_together(self, ready: Sequence[ActiveRun], accounts: Sequence[str]) -> bool:
        """One training turn; False if all it did was to begin uploads and downloads."""
        by_fairness = sorted(ready, key=lambda run: (accounts.index(run.run.account_id), run.used_at))
        model = by_fairness[0].model
        together = [run for run in by_fairness if run.model is model]
        report = self._train.take(together, tokens_max=self._settings.tokens_max)
        if report is None:
            return False
        self._charge(Activity.TRAINING, report.device_ns)
        for tail_ns in report.tails_ns:
            self._tails.add(tail_ns)
        return True

    def _charge(self, activity: Activity, device_ns: Mapping[str, int]) -> None:
        for account, consumed in device_ns.items():
            self._fair.charge((account, activity), consumed)

    def _store_work(self) -> None:
        """Tell what no commit of this turn has told."""
        if not self._meter.has_news:
            return
        try:
            with self._storage.database.begin() as tx:
                self._meter.write(tx)
        except DatabaseUnavailableError:
            self._meter.doubt()
        else:
            self._meter.told()

    # ------------------------------------------------------------------------------------------------ leaving memory

    def _park(self) -> None:
        """Let go of runs that are void, or that are cold or too many and written back."""
        for run in self.roster.remove_cold(warm_s=self._settings.warm_s, num_max=self._settings.run_states_max):
            retrying(partial(self._release, run.lease), on_wait=self._note_progress)
            log.info("run_parked", run=run.id, seq=run.state_seq, void=run.void)

    def _release(self, lease: Lease) -> None:
        with self._storage.database.begin() as tx:
            leases.release(tx, lease)
        failpoints.reach(Point.LEASE_RELEASED)

    def _hand_over(self) -> None:
        """Write every state back; `Worker.stop` then gives leases and claims up."""
        self._fetcher.close()
        self._writeback.flush(self.roster.active(), on_progress=self._note_progress)
        log.info("written_back", runs=len(self.roster.active()))
