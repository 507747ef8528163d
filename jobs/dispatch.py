"""Announces work, always after the commit that made it. A broker that is away only delays it: see the sweeper."""

from __future__ import annotations

from datetime import timedelta
from typing import Protocol, TypeVar

import structlog
from celery import Celery

from jobs.app import WORK_QUEUE, worker_queue_name
from jobs.messages import Message, RunBillingJob, RunHasWork, SamplesWait, SweepObjects
from storage import failpoints, leases
from storage.database import Database
from storage.failpoints import Point

log = structlog.get_logger()

RETRY = {"max_retries": 1, "interval_start": 0.05, "interval_step": 0.1, "interval_max": 0.2}
WARM_EXPIRES_S = 3.0
Answer_co = TypeVar("Answer_co", covariant=True)


class Announces(Protocol[Answer_co]):
    """Who can be told that there is work: `Dispatcher` says it now, `Announcer` later and elsewhere.

    An answer of `object` means that whoever tells does not look at it.
    """

    def announce_run(self, run_id: str) -> Answer_co:
        """Say that a run has work."""

    def announce_samples(self) -> Answer_co:
        """Say that samples are queued."""


class Dispatcher:
    """Chooses the queue of a message and sends it; waits for the broker, at most for as long as `jobs.app` says.

    Every method returns whether the broker took the message.
    """

    def __init__(self, app: Celery, database: Database, *, message_expires_s: float) -> None:
        self._app = app
        self._database = database
        self._message_expires_s = message_expires_s

    def announce_run(self, run_id: str) -> bool:
        """Say that a run has work: to the worker that holds its lease, else to any."""
        with self._database.read() as tx:
            now = self._database.now(tx)
            holder = leases.find_holder(tx, run_id, now=now)
        queue, expires_s = WORK_QUEUE, self._message_expires_s
        if holder is not None:
            queue, expires_s = worker_queue_name(holder), WARM_EXPIRES_S
        return self._send(RunHasWork(run_id, now + timedelta(seconds=expires_s)), queue, expires_s)

    def announce_samples(self) -> bool:
        """Say that samples are queued."""
        return self._send(SamplesWait(), WORK_QUEUE, self._message_expires_s)

    def announce_sweep(self) -> bool:
        """Say that it is time to delete what nothing needs."""
        return self._send(SweepObjects(), WORK_QUEUE, self._message_expires_s)

    def announce_billing(self, job: str) -> bool:
        """Say that it is time for a job of `billing_jobs.JOBS`."""
        return self._send(RunBillingJob(job), WORK_QUEUE, self._message_expires_s)

    def _send(self, message: Message, queue: str, expires_s: float) -> bool:
        failpoints.reach(Point.MESSAGE_BEGUN)
        try:
            self._app.send_task(
                message.task,
                kwargs=message.arguments(),
                exchange="",
                routing_key=queue,
                expiration=expires_s,  # by the broker's clock, if at all; Celery's `expires` goes by the taker's
                retry=True,
                retry_policy=RETRY,
            )
        except Exception as error:  # the broker's libraries raise what they like, e.g. when it is full
            log.warning("announcement_failed", task=message.task, queue=queue, error=str(error))
            return False
        failpoints.reach(Point.MESSAGE_SENT)
        return True
