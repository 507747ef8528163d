"""Newest state to storage in the background: per run one upload in flight, the next begins when the last has ended.

The engine copies a state into staging memory, nothing more; encoding, hashing and the upload are other threads' work.
It never waits for an upload while the run's replay tail is under its bound; beyond, that run alone waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue

import structlog

from storage import failpoints, keys, snapshots
from storage.checksums import size_of
from storage.errors import LeaseLostError
from storage.failpoints import Point
from storage.leases import Lease
from storage.open import Storage
from worker import faults
from worker.active_run import ActiveRun
from worker.engine.run_state import Staging, StateCopy

log = structlog.get_logger()

UPLOADS_AT_ONCE = 2
RETRY_MOST_S = 10.0


class WriteBack:
    """Takes copies of run states at an operation's boundary, and uploads them without making the engine wait."""

    def __init__(
        self, storage: Storage, *, interval_s: float, idle_s: float, tail_max_s: float, wake: Callable[[], None]
    ) -> None:
        """Make it.

        Args:
            storage: where snapshots go.
            interval_s: least time from the beginning of one upload of a run to that of the next.
            idle_s: a run that has been idle this long is written back whatever the interval, so that it can be parked.
            tail_max_s: device time of the tail beyond which a run waits for its upload.
            wake: called whenever an upload has ended.
        """
        self._storage = storage
        self._interval_s = interval_s
        self._idle_s = idle_s
        self._tail_max_ns = round(tail_max_s * 1e9)
        self._wake = wake
        self._pool = ThreadPoolExecutor(UPLOADS_AT_ONCE, thread_name_prefix="writeback")
        self._free: SimpleQueue[Staging] = SimpleQueue()
        for _ in range(UPLOADS_AT_ONCE):
            self._free.put(Staging())

    def holds(self, run: ActiveRun) -> bool:
        """Whether a run has to wait until its state is written back: a death now would cost more than promised."""
        waits = run.tail.device_ns >= self._tail_max_ns and run.is_dirty
        if waits != run.held:
            run.held = waits
            tail_s = run.tail.device_ns / 1e9
            if waits:
                log.warning("run_waits_for_writeback", run=run.id, seq=run.state_seq, tail_s=tail_s)
            else:
                log.info("run_goes_on", run=run.id, seq=run.state_seq, tail_s=tail_s)
        return waits

    def offer(self, runs: Sequence[ActiveRun]) -> None:
        """Begin to write back those runs that are newer than their snapshots and whose last upload has ended.

        On the engine's thread, between two operations: the copies are taken here, and only of what is uploaded now.
        Those that are held come first, then those that have not been written for longest.
        """
        now = time.monotonic()
        for run in runs:
            run.tail.shorten(run.snapshot_seq)
        due = [run for run in runs if self._is_due(run, now)]
        for run in sorted(due, key=lambda run: (not run.held, run.write_began_at)):
            if not self._begin(run, now):
                break

    def flush(self, runs: Sequence[ActiveRun], *, on_progress: Callable[[], None]) -> None:
        """Write all states back, on leaving; the uploads in flight end first. What fails leaves a longer tail."""
        self.close()
        staging = self._free.get()
        for run in runs:
            on_progress()
            if run.is_dirty and run.state is not None and not run.void:
                try:
                    copy = run.state.copy(staging)
                except Exception as error:  # the others are written all the same
                    _postpone(run, run.state_seq, error)
                else:
                    self._write(run, run.lease, run.state_seq, copy)

    def close(self) -> None:
        """Wait for the uploads in flight."""
        self._pool.shutdown(wait=True)

    def _is_due(self, run: ActiveRun, now: float) -> bool:
        if not run.is_dirty or run.writing or run.void or run.state is None:
            return False
        is_wanted = run.held or (run.is_idle and now >= run.used_at + self._idle_s)
        return now >= run.write_after or (is_wanted and not run.write_failures)

    def _begin(self, run: ActiveRun, now: float) -> bool:
        """Copy and hand over to an upload; False if as many as there may be are under way."""
        try:
            staging = self._free.get_nowait()
        except Empty:
            return False
        assert run.state is not None
        try:
            copy = run.state.copy(staging)
        except Exception as error:
            self._free.put(staging)
            faults.raise_if_device_is_lost(error)
            _postpone(run, run.state_seq, error)
            return True
        run.writing, run.write_began_at, run.write_after = True, now, now + self._interval_s
        self._pool.submit(self._upload, run, run.lease, run.state_seq, copy, staging)
        return True

    def _upload(self, run: ActiveRun, lease: Lease, seq: int, copy: StateCopy, staging: Staging) -> None:
        try:
            self._write(run, lease, seq, copy)
        finally:
            self._free.put(staging)
            run.writing = False
            self._wake()

    def _write(self, run: ActiveRun, lease: Lease, seq: int, copy: StateCopy) -> None:
        try:
            write_snapshot(self._storage, lease, seq, copy, damaged=run.damaged)
            run.snapshot_seq, run.damaged = max(run.snapshot_seq, seq), ()
            run.write_failures = 0
        except LeaseLostError:
            run.void = True
        except Exception as error:  # tried again later with a newer state; the replay tail grows meanwhile
            _postpone(run, seq, error)


def _postpone(run: ActiveRun, seq: int, error: Exception) -> None:
    run.write_failures += 1
    pause_s = min(2.0 ** (run.write_failures - 1), RETRY_MOST_S)
    run.write_after = time.monotonic() + pause_s
    log.warning("writeback_failed", run=run.id, seq=seq, error=str(error), retry_in_s=pause_s)


def write_snapshot(storage: Storage, lease: Lease, seq: int, copy: StateCopy, *, damaged: Collection[int] = ()) -> None:
    """Store a run's state and name it; snapshots that were found damaged go.

    Raises:
        LeaseLostError: another worker has the run.
        StorageError: it could not be stored.
    """
    key = keys.snapshot_key(lease.run_id, seq)
    failpoints.reach(Point.SNAPSHOT_BEGUN)
    pieces = copy.pieces()
    sha256 = storage.payloads.put_pieces(pieces, key)
    failpoints.reach(Point.SNAPSHOT_PUT)
    with storage.database.begin() as tx:
        snapshots.add(
            tx,
            lease,
            seq=seq,
            object_key=key,
            data_sha256=sha256,
            size_bytes=size_of(pieces),
            now=storage.database.now(tx),
            damaged=damaged,
        )
    failpoints.reach(Point.SNAPSHOT_NAMED)
