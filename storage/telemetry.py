"""Logs: an event name and fields, one JSON object a line, or coloured text on a terminal. Set up once per process."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import structlog


def set_up_logging(process: str, *, handler: logging.Handler | None = None, **fields: Any) -> None:
    """Send structured and standard log lines of this process to standard error, or to a handler.

    Args:
        process: `api`, `worker`, `scheduler` …; on every line.
        handler: where lines go, as JSON.
        fields: more that stands on every line.
    """
    level = logging.getLevelNamesMapping().get(os.environ.get("PIECEWORK_LOG_LEVEL", "INFO").upper(), logging.INFO)
    everywhere = {"process": process, **fields}

    def add_fields(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return {**everywhere, **event}  # not a context variable: those stand on the lines of one thread only

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        add_fields,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer()
        if handler is None and sys.stderr.isatty()
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = handler or logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for noisy in ("celery", "kombu", "amqp", "httpx", "apscheduler", "urllib3", "uvicorn.access", "alembic"):
        logging.getLogger(noisy).setLevel(max(level, logging.WARNING))
