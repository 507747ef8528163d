"""Again, until database and object store answer: with growing pauses and jitter, so that not all come back at once."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

import structlog

from storage.errors import DatabaseUnavailableError, ObjectStoreUnavailableError

log = structlog.get_logger()

T = TypeVar("T")

RETRY_FIRST_S = 0.05
RETRY_MOST_S = 2.0
FOR_EVER = float("inf")


def do_nothing() -> None:
    """For those whom nobody watches."""


def retrying(
    call: Callable[[], T], *, on_wait: Callable[[], None] = do_nothing, give_up_after_s: float = FOR_EVER
) -> T:
    """Call until database and object store answer, with growing pauses and jitter; `on_wait` before each pause.

    Args:
        give_up_after_s: from then on the error is raised.
    """
    pause_s, deadline = RETRY_FIRST_S, time.monotonic() + give_up_after_s
    while True:
        try:
            return call()
        except (DatabaseUnavailableError, ObjectStoreUnavailableError) as error:
            if time.monotonic() >= deadline:
                raise
            log.warning("storage_unavailable", error=str(error), retry_in_s=pause_s)
            on_wait()
            time.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311
            pause_s = min(2 * pause_s, RETRY_MOST_S)
