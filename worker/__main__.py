"""`python -m worker`: one worker process. It pulls messages until it is told to stop, then hands its work over."""

from __future__ import annotations

import sys
import warnings

import structlog
from celery.apps.worker import Worker as CeleryWorker
from celery.signals import worker_shutting_down
from kombu import Queue

from jobs.app import WORK_QUEUE, worker_queue
from jobs.settings import JobsSettings
from storage.telemetry import set_up_logging
from worker.build import build_worker
from worker.consumer import PromptConsumer
from worker.settings import WorkerSettings

log = structlog.get_logger()


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    settings = WorkerSettings()
    set_up_logging("worker")
    # Celery's advice against root is about pickled messages; ours are JSON.
    warnings.filterwarnings("ignore", message="You're running the worker with superuser privileges")
    try:
        worker = build_worker(settings, JobsSettings())
    except ValueError as error:
        sys.exit(f"piecework worker: {error}")
    worker.app.conf.task_queues = [Queue(WORK_QUEUE, durable=True), worker_queue(worker.id)]

    def leave(**_: object) -> None:
        worker.leave()

    worker_shutting_down.connect(leave, weak=False)
    worker.start()
    log.info("worker_ready", worker=worker.id)
    consumer: CeleryWorker = worker.app.Worker(
        pool="threads",
        concurrency=settings.concurrency,
        hostname=worker.id,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        loglevel="WARNING",
        quiet=True,
        consumer_cls=PromptConsumer,
    )
    try:
        consumer.start()
    finally:
        worker.stop()
    sys.exit(consumer.exitcode)


if __name__ == "__main__":
    main()
