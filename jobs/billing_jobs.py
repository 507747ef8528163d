"""Jobs of the bill that run on a clock: the scheduler says when, a worker's task calls `run`, `billing/` does it.

Messages may be lost or doubled, so every job finds out itself what there is to do and does nothing twice; each fires
more often than it has work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import structlog

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
        every: how often; the first time soon after a scheduler begins to lead.
        verb: does a part of the work, bounded in time; returns whether all is done.
    """

    every: timedelta
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
    "roll_up": BillingJob(timedelta(seconds=60), _roll_up),
    "close_months": BillingJob(timedelta(minutes=10), _close_months),
    "meter_storage": BillingJob(timedelta(minutes=10), _meter_storage),
    "reconcile": BillingJob(timedelta(hours=1), _reconcile),
    "release_holds": BillingJob(timedelta(minutes=10), _release_holds),
    "deliver_webhooks": BillingJob(timedelta(seconds=5), _deliver_webhooks),
    "forget_deliveries": BillingJob(timedelta(hours=1), _forget_deliveries),
    "export_day": BillingJob(timedelta(hours=1), _export_day),
}
"""By name, as messages carry it."""
