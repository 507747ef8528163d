"""One worker process: it pulls messages until it is told to stop, then hands its work over."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

import structlog
from celery import Celery
from celery.apps.worker import Worker as CeleryWorker
from celery.signals import setup_logging, worker_ready, worker_shutting_down
from kombu import Queue
from pydantic import ValidationError

from jobs.app import WORK_QUEUE, worker_queue
from jobs.settings import JobsSettings
from storage.settings import say_what_is_wrong
from storage.telemetry import set_up_logging
from worker.build import build_worker
from worker.consumer import PromptConsumer
from worker.settings import WorkerSettings

log = structlog.get_logger()


def run(*, on_ready: Callable[[], None]) -> None:
    """Run until SIGTERM or SIGINT.

    Args:
        on_ready: called once messages are taken.
    """
    set_up_logging("worker")
    try:
        settings = WorkerSettings()
        worker = build_worker(settings, JobsSettings())
    except ValidationError as error:
        sys.exit(f"piecework worker: {say_what_is_wrong(error)}")
    except ValueError as error:
        sys.exit(f"piecework worker: {error}")
    consumer = make_consumer(worker.app, settings, worker.id)

    def leave(**_: object) -> None:
        worker.leave()

    def tell(**_: object) -> None:
        log.info("worker_ready", worker=worker.id)
        on_ready()

    worker_shutting_down.connect(leave, weak=False)
    worker_ready.connect(tell, weak=False)
    worker.start()
    try:
        consumer.start()
    finally:
        worker.stop()
    sys.exit(consumer.exitcode)


def _logs_are_set_up(**_: object) -> None:
    """That somebody listens keeps Celery from setting the level of all logs to its own."""


def make_consumer(app: Celery, settings: WorkerSettings, worker_id: str) -> CeleryWorker:
    """What takes messages: the common ones, and those to this worker. It connects when it is started."""
    # Celery's advice against root is about pickled messages; ours are JSON.
    warnings.filterwarnings("ignore", message="You're running the worker with superuser privileges")
    setup_logging.connect(_logs_are_set_up, weak=False)
    app.conf.task_queues = [Queue(WORK_QUEUE, durable=True), worker_queue(worker_id)]
    return app.Worker(
        pool="threads",
        concurrency=settings.concurrency,
        hostname=worker_id,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        loglevel="WARNING",
        quiet=True,
        consumer_cls=PromptConsumer,
    )
