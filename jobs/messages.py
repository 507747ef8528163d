"""What the broker carries: that there is work, never the work itself. Losing or doubling a message changes nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

VERSION = 1


@dataclass(frozen=True)
class RunHasWork:
    """Operations of this run may wait in the journal."""

    task: ClassVar[str] = "piecework.advance_run"
    run_id: str

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the task."""
        return {**asdict(self), "version": VERSION}


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


Message = RunHasWork | SamplesWait | SweepObjects
