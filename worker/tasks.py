"""Celery tasks: message in, loop called."""

from __future__ import annotations

from celery import Celery

from jobs.messages import RunHasWork, SamplesWait, SweepObjects
from jobs.settings import JobsSettings
from storage import failpoints, sweeper
from storage.failpoints import Point
from storage.open import Storage
from worker.intake import RunIntake
from worker.sample_feeder import SampleFeeder


def register(app: Celery, storage: Storage, intake: RunIntake, feeder: SampleFeeder, settings: JobsSettings) -> None:
    """Add the tasks to a Celery app; what they call is handed in."""

    def advance_run(run_id: str, version: int) -> None:  # noqa: ARG001
        failpoints.reach(Point.TASK_BEGUN)
        intake.advance(run_id)
        failpoints.reach(Point.TASK_DONE)

    def draw_samples(version: int) -> None:  # noqa: ARG001
        feeder.notify()

    def sweep_objects(version: int) -> None:  # noqa: ARG001
        sweeper.sweep(
            storage.database,
            storage.objects,
            result_retention_s=settings.result_retention_s,
            sampling_session_idle_s=settings.sampling_session_idle_s,
        )

    app.task(name=RunHasWork.task)(advance_run)
    app.task(name=SamplesWait.task)(draw_samples)
    app.task(name=SweepObjects.task)(sweep_objects)
