"""Renews leases and claims while the engine makes progress."""

from __future__ import annotations

import threading

import structlog

from storage.errors import DatabaseUnavailableError
from worker.loop import EngineLoop
from worker.settings import WorkerSettings

log = structlog.get_logger()

RENEWALS_PER_LEASE = 3


class Keeper(threading.Thread):
    """The worker's sign of life: as long as it is given, nobody else takes its runs."""

    def __init__(self, engine: EngineLoop, settings: WorkerSettings) -> None:
        super().__init__(name="keeper", daemon=True)
        self._engine = engine
        self._settings = settings
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Give no further sign of life."""
        self._stopping.set()
        self.join()

    def run(self) -> None:
        """Renew until stopped, unless a step has passed its deadline."""
        while not self._stopping.wait(self._settings.lease_s / RENEWALS_PER_LEASE):
            if self._engine.stuck_s > self._settings.step_deadline_s:
                continue
            try:
                self._engine.renew()
            except DatabaseUnavailableError as error:
                log.warning("renewal_failed", error=str(error))
            except Exception:  # without this thread others would take the runs
                log.exception("renewal_failed")
