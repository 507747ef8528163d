"""What the broker carries: that there is work, never the work itself. Losing or doubling a message changes nothing.

A message says itself until when it counts, by the database's clock: processes may differ about the time, and some
brokers keep what nobody takes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, ClassVar

VERSION = 1


@dataclass(frozen=True)
class RunHasWork:
    """Operations of this run may wait in the journal.

    Attributes:
        expires_at: whoever does not have the run already ignores the message from then on: it has been announced again.
    """

    task: ClassVar[str] = "piecework.advance_run"
    run_id: str
    expires_at: datetime

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the task."""
        return {**asdict(self), "expires_at": self.expires_at.isoformat(), "version": VERSION}


@dataclass(frozen=True)
class SamplesWait:
    """Samples may be queued in the journal."""

    task: ClassVar[str] = "piecework.draw_samples"

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the task."""
        return {"version": VERSION}


@dataclass(frozen=True)
class SweepObjects:
    """Outcomes, checkpoints and objects may be past their time."""

    task: ClassVar[str] = "piecework.sweep_objects"

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the task."""
        return {"version": VERSION}


@dataclass(frozen=True)
class RunBillingJob:
    """It is time for one of the jobs of `billing_jobs.JOBS`.

    Attributes:
        job: its name.
    """

    task: ClassVar[str] = "piecework.run_billing_job"
    job: str

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the task."""
        return {**asdict(self), "version": VERSION}


Message = RunHasWork | SamplesWait | SweepObjects | RunBillingJob
