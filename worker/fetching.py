"""Brings a run's next operations from the journal into memory, their payloads too. On the engine's thread."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import structlog

from jobs import operations
from jobs.operations import Category, Failure
from storage import journal
from storage.errors import DamagedObjectError, ObjectNotFoundError, StorageError
from storage.journal import Operation, Status
from storage.open import Storage
from worker.active_run import ActiveRun, Queued

log = structlog.get_logger()

FETCHED_MOST = 64
THREADS = 4


class OperationFetcher:
    """Reads ahead, so that a run with many operations is asked for once in a while only."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="fetch")

    def refill(self, runs: Sequence[ActiveRun]) -> None:
        """Fetch operations of those that may have more. One whose storage does not answer is asked again next time."""
        for run in runs:
            if run.may_have_more and len(run.queue) < FETCHED_MOST // 2:
                try:
                    self._refill(run)
                except StorageError as error:
                    log.warning("fetch_failed", run=run.id, error=str(error))
                    run.may_have_more = True

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _refill(self, run: ActiveRun) -> None:
        run.may_have_more = False  # before the read: a notice that comes during it counts
        with self._storage.database.read() as tx:
            following = journal.next_in_order(tx, run.id, after_seq=run.fetched_seq, limit=FETCHED_MOST)
        if len(following) == FETCHED_MOST:
            run.may_have_more = True
        large = [operation for operation in following if operation.payload.key is not None]
        fetched = dict(zip((op.seq for op in large), self._pool.map(self._fetch, large), strict=True))
        run.queue.extend(fetched.get(operation.seq) or self._fetch(operation) for operation in following)

    def _fetch(self, operation: Operation) -> Queued:
        if operation.status not in (Status.QUEUED, Status.RUNNING):
            return Queued(operation, None)
        try:
            return Queued(operation, operations.decode(self._storage.payloads.get(operation.payload)))
        except (ObjectNotFoundError, DamagedObjectError, ValueError) as error:
            log.error("payload_unreadable", request=operation.request_id, error=str(error))
            return Queued(operation, None, Failure(f"what was submitted cannot be read: {error}", Category.SERVER))
