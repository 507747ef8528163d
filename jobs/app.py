"""The Celery app: broker, queues, acknowledgement.

Messages are JSON and acknowledged when their task ends. Nobody waits for a task's result: outcomes are in the journal.
"""

from __future__ import annotations

from celery import Celery
from kombu import Exchange, Queue

from jobs.settings import JobsSettings

WORK_QUEUE = "piecework.work"
OUTCOMES = Exchange("piecework.outcomes", type="fanout", durable=False, delivery_mode=1)
VISIBILITY_TIMEOUT_S = 3600
"""Redis and Valkey deliver again what a worker took and has not acknowledged for so long.

A task returns within moments (its slice), so it is only what a worker took before it died. By then that has been
announced again, and does not count any more.
"""


def make_app(settings: JobsSettings | None = None) -> Celery:
    """A Celery app on the broker of the settings; nothing is connected yet."""
    settings = settings or JobsSettings()
    app = Celery("piecework", broker=settings.resolved_broker_url(), set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        # RabbitMQ closes the channel of a worker that was stopped for longer than its consumer timeout.
        broker_channel_error_retry=True,
        broker_connection_max_retries=None,  # a broker may be away for as long as it likes
        broker_connection_retry_on_startup=True,
        broker_connection_timeout=4,
        broker_transport_options=transport_options(settings.resolved_broker_url()),
        task_acks_late=True,
        task_default_queue=WORK_QUEUE,
        task_queues=[Queue(WORK_QUEUE, durable=True)],
        task_ignore_result=True,
        task_serializer="json",
        task_store_errors_even_if_ignored=False,
        worker_prefetch_multiplier=1,
        # After a reconnection Celery would raise the prefetch count from the pool's threads, while the main one reads
        # the same connection: frames are torn, or both wait for ever and the worker takes nothing any more.
        worker_enable_prefetch_count_reduction=False,
        worker_detect_quorum_queues=True,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,  # a traceback is written as it is, and to a real file
        worker_send_task_events=False,
        worker_enable_remote_control=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
    )
    return app


def worker_queue(worker_id: str) -> Queue:
    """The queue of one warm worker: it gets the messages of the runs whose lease it holds."""
    return Queue(worker_queue_name(worker_id), durable=False, auto_delete=True)


def worker_queue_name(worker_id: str) -> str:
    """Its name."""
    return f"piecework.worker.{worker_id}"


def transport_options(broker_url: str) -> dict[str, object]:
    """Options of the broker's transport; only Redis and Valkey need some."""
    if not broker_url.startswith("redis"):
        return {}
    return {
        "visibility_timeout": VISIBILITY_TIMEOUT_S,
        "socket_connect_timeout": 4,
        "socket_timeout": 10,
        "health_check_interval": 10,
    }
