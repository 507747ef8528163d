"""Celery tasks: message in, loop called. Each returns within moments, so that no timeout of a broker ever ends one."""

from __future__ import annotations

from datetime import datetime

from celery import Celery

from jobs import billing_jobs
from jobs.dispatch import Dispatcher
from jobs.messages import RunBillingJob, RunHasWork, SamplesWait, SweepObjects
from jobs.settings import JobsSettings
from storage import failpoints, sweeper
from storage.failpoints import Point
from storage.open import Storage
from worker.intake import RunIntake
from worker.sample_feeder import SampleFeeder


def register(
    app: Celery,
    *,
    storage: Storage,
    intake: RunIntake,
    feeder: SampleFeeder,
    dispatcher: Dispatcher,
    settings: JobsSettings,
    slice_s: float,
) -> None:
    """Add the tasks to a Celery app; what they call is handed in.

    Args:
        slice_s: how long a sweep of objects goes on; what is left is announced again.
    """

    def advance_run(run_id: str, expires_at: str, version: int) -> None:  # noqa: ARG001
        failpoints.reach(Point.TASK_BEGUN)
        intake.advance(run_id, expires_at=datetime.fromisoformat(expires_at))
        failpoints.reach(Point.TASK_DONE)

    def draw_samples(version: int) -> None:  # noqa: ARG001
        feeder.notify()

    def sweep_objects(version: int) -> None:  # noqa: ARG001
        swept = sweeper.sweep(
            storage.database,
            storage.objects,
            result_retention_s=settings.result_retention_s,
            sampling_session_idle_s=settings.sampling_session_idle_s,
            pass_s=slice_s,
        )
        if not swept.is_complete:
            dispatcher.announce_sweep()

    def run_billing_job(job: str, version: int) -> None:  # noqa: ARG001
        if not billing_jobs.run(job, storage, settings):
            dispatcher.announce_billing(job)

    app.task(name=RunHasWork.task)(advance_run)
    app.task(name=SamplesWait.task)(draw_samples)
    app.task(name=SweepObjects.task)(sweep_objects)
    app.task(name=RunBillingJob.task)(run_billing_job)
