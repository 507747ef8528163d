"""Jobs of the bill that run on a clock: the scheduler says when, a worker's task calls `run`, `billing/` does it.

Messages may be lost or doubled, so every job finds out itself what there is to do and does nothing twice; each fires
more often than it has work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import structlog
from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.interval import IntervalTrigger

from billing import budget_checks, budgets, closing, exports, reconciliation, rollups, storage_metering
from jobs.settings import JobsSettings
from jobs.webhook_sender import WebhookSender
from storage.open import Storage

log = structlog.get_logger()

PASS_S = 3.0
"""So long a job goes on before it asks to be announced again: a task returns within moments."""


@dataclass(frozen=True)
class BillingJob:
    """A job and when it is fired.

    Attributes:
        verb: does a part of the work, bounded in time; returns whether all is done.
    """

    trigger: BaseTrigger
    verb: Callable[[Storage, JobsSettings], bool]


def run(name: str, storage: Storage, settings: JobsSettings) -> bool:
    """Do a part of a job.

    Returns:
        Whether all of it is done; else it has to be called again. A job that this version does not know is done.
    """
    job = JOBS.get(name)
    if job is None:
        log.warning("billing_job_unknown", job=name)
        return True
    return job.verb(storage, settings)


def _roll_up(storage: Storage, _settings: JobsSettings) -> bool:
    return rollups.roll_up(storage.database, pass_s=PASS_S)


def _close_months(storage: Storage, _settings: JobsSettings) -> bool:
    return closing.close_due(storage.database, pass_s=PASS_S)


def _reconcile(storage: Storage, _settings: JobsSettings) -> bool:
    reconciliation.record_due(storage.database)
    return True


def _meter_storage(storage: Storage, _settings: JobsSettings) -> bool:
    return storage_metering.meter(storage.database, pass_s=PASS_S)


def _deliver_webhooks(storage: Storage, _settings: JobsSettings) -> bool:
    budgets.begin_periods(storage.database)
    return WebhookSender(storage.database).deliver_due(pass_s=PASS_S)


def _release_holds(storage: Storage, _settings: JobsSettings) -> bool:
    budget_checks.release_leftovers(storage.database)
    return True


def _forget_deliveries(storage: Storage, _settings: JobsSettings) -> bool:
    return WebhookSender(storage.database).forget_old(pass_s=PASS_S)


def _export_day(storage: Storage, _settings: JobsSettings) -> bool:
    return exports.store_next_day(storage.database, storage.objects) is None


JOBS: Mapping[str, BillingJob] = {
    "roll_up": BillingJob(IntervalTrigger(seconds=60, timezone="UTC"), _roll_up),
    "close_months": BillingJob(IntervalTrigger(minutes=10, timezone="UTC"), _close_months),
    "meter_storage": BillingJob(IntervalTrigger(minutes=10, timezone="UTC"), _meter_storage),
    "reconcile": BillingJob(IntervalTrigger(hours=1, timezone="UTC"), _reconcile),
    "release_holds": BillingJob(IntervalTrigger(minutes=10, timezone="UTC"), _release_holds),
    "deliver_webhooks": BillingJob(IntervalTrigger(seconds=5, timezone="UTC"), _deliver_webhooks),
    "forget_deliveries": BillingJob(IntervalTrigger(hours=1, timezone="UTC"), _forget_deliveries),
    "export_day": BillingJob(IntervalTrigger(hours=1, timezone="UTC"), _export_day),
}
"""By name, as messages carry it."""
