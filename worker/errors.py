"""Everything that a worker can fail at, beside what storage and the engine raise.

WorkerError
├── ModelUnavailableError     the base model is not served any more, or its files cannot be loaded
└── NoStateError              neither a snapshot nor the journal gives back a run's state
"""

from __future__ import annotations


class WorkerError(Exception):
    """The worker failed."""


class ModelUnavailableError(WorkerError):
    """A base model cannot be loaded; operations that need it fail with these words.

    Attributes:
        may_pass: whether the same may succeed later or on another worker: memory or room on the disk was wanting.
    """

    def __init__(self, name: str, reason: str, *, may_pass: bool = False) -> None:
        super().__init__(f"base model {name!r} cannot be loaded: {reason}")
        self.name = name
        self.may_pass = may_pass


class NoStateError(WorkerError):
    """A run's state cannot be rebuilt; this is a defect or damage, never the client's fault."""

    def __init__(self, run_id: str, reason: str) -> None:
        super().__init__(f"the state of run {run_id} cannot be rebuilt: {reason}")
        self.run_id = run_id
