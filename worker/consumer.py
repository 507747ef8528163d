"""Celery's consumer, but one that comes back soon after its broker does."""

from __future__ import annotations

import functools

from celery.worker.consumer import Consumer
from kombu import Connection

RECONNECT_S = 0.2
RECONNECT_STEP_S = 0.4
RECONNECT_MAX_S = 2.0


class PromptConsumer(Consumer):  # type: ignore[misc]
    """Tries again after at most `RECONNECT_MAX_S`; Celery's own lets up to half a minute pass, while work waits."""

    def ensure_connected(self, conn: Connection) -> Connection:
        """Wait until the broker answers, or the worker is told to stop."""
        conn.ensure_connection = functools.partial(
            conn.ensure_connection,
            interval_start=RECONNECT_S,
            interval_step=RECONNECT_STEP_S,
            interval_max=RECONNECT_MAX_S,
        )
        return super().ensure_connected(conn)
