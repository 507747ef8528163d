"""Newest state to storage in the background: per run one upload in flight, the next begins when the last has ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import structlog

from storage import failpoints, keys, snapshots
from storage.errors import LeaseLostError
from storage.failpoints import Point
from storage.leases import Lease
from storage.open import Storage
from worker.active_run import ActiveRun

log = structlog.get_logger()

UPLOADS_AT_ONCE = 2
RETRY_MOST_S = 30.0


class WriteBack:
    """Takes copies of run states at an operation's boundary, and uploads them without making the engine wait."""

    def __init__(self, storage: Storage, *, interval_s: float, wake: Callable[[], None]) -> None:
        self._storage = storage
        self._interval_s = interval_s
        self._wake = wake
        self._pool = ThreadPoolExecutor(UPLOADS_AT_ONCE, thread_name_prefix="writeback")

    def offer(self, run: ActiveRun) -> None:
        """Begin to write a run's state back if it is newer than its snapshot and no upload is in flight.

        On the engine's thread, between two operations: the copy is taken here.
        """
        now = time.monotonic()
        due = now >= run.write_after or (run.is_idle and not run.write_failures)
        if not run.is_dirty or run.writing or run.void or run.state is None or not due:
            return
        run.writing, run.write_after = True, now + self._interval_s
        data = run.state.serialize()
        self._pool.submit(self._write, run, run.lease, run.state_seq, data)

    def close(self) -> None:
        """Wait for the uploads in flight."""
        self._pool.shutdown(wait=True)

    def _write(self, run: ActiveRun, lease: Lease, seq: int, data: bytes) -> None:
        try:
            write_snapshot(self._storage, lease, seq, data)
            run.snapshot_seq = max(run.snapshot_seq, seq)
            run.write_failures = 0
        except LeaseLostError:
            run.void = True
        except Exception as error:  # tried again later with a newer state; the replay tail grows meanwhile
            run.write_failures += 1
            run.write_after = time.monotonic() + min(2.0**run.write_failures, RETRY_MOST_S)
            log.warning("writeback_failed", run=lease.run_id, seq=seq, error=str(error))
        finally:
            run.writing = False
            self._wake()


def write_snapshot(storage: Storage, lease: Lease, seq: int, data: bytes) -> None:
    """Store a run's state and name it.

    Raises:
        LeaseLostError: another worker has the run.
        StorageError: it could not be stored.
    """
    key = keys.snapshot_key(lease.run_id, seq)
    failpoints.reach(Point.SNAPSHOT_BEGUN)
    storage.payloads.put_object(data, key)
    failpoints.reach(Point.SNAPSHOT_PUT)
    with storage.database.begin() as tx:
        snapshots.add(
            tx,
            lease,
            seq=seq,
            object_key=key,
            data_sha256=snapshots.checksum(data),
            size_bytes=len(data),
            now=storage.database.now(tx),
        )
    failpoints.reach(Point.SNAPSHOT_NAMED)
