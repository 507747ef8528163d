"""Renews leases and claims while the engine makes progress, and ends a worker whose engine does not."""

from __future__ import annotations

import os
import threading
import time

import structlog

from storage.errors import DatabaseUnavailableError
from worker.loop import EngineLoop
from worker.settings import WorkerSettings

log = structlog.get_logger()

RENEWALS_PER_LEASE = 3
STUCK_EXIT_STATUS = 70


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
        """Renew until stopped."""
        while not self._stopping.wait(self._settings.lease_s / RENEWALS_PER_LEASE):
            self._end_if_stuck()
            try:
                self._engine.renew()
            except DatabaseUnavailableError as error:
                log.warning("renewal_failed", error=str(error))
            except Exception:  # without this thread nobody would notice a stuck engine
                log.exception("renewal_failed")

    def _end_if_stuck(self) -> None:
        stuck_s = time.monotonic() - self._engine.progress_at
        ended = not self._engine.is_alive() and not self._engine.is_draining
        if ended or stuck_s > self._settings.step_deadline_s:
            log.critical("engine_stuck", seconds=round(stuck_s), alive=self._engine.is_alive())
            os._exit(STUCK_EXIT_STATUS)  # threads in native code cannot be ended; the leases expire by themselves
