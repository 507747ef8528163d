"""A run in this worker's memory: its lease, its state, and the operations that wait for their turn."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from jobs.operations import Body, Failure
from storage.journal import Operation
from storage.leases import Lease
from storage.runs import Run
from worker.engine.run_state import RunState
from worker.replay_tail import ReplayTail
from worker.residency import ResidentModel


@dataclass(frozen=True, eq=False)
class Queued:
    """An operation fetched from the journal; `body` is None when it was failed already."""

    operation: Operation
    body: Body | None
    failure: Failure | None = None
    """Why it cannot be executed: its payload is gone or cannot be read."""


@dataclass(eq=False)
class ActiveRun:
    """A run whose lease this worker holds.

    Attributes:
        model: None when the base model cannot be loaded; `model_error` says why.
        state: None before operation 0, or when it failed.
        state_seq: last committed operation.
        fetched_seq: last operation in `queue`, or `state_seq`.
        gradients_failed: whether a `forward_backward` since the last `optim_step` has failed.
        pending: I/O that the operation at the head of the queue waits for: weights being stored or loaded.
        snapshot_seq: state that the newest snapshot holds; -1 before the first.
        damaged: snapshots (`seq`s) that could not be used; they go when the next one is stored.
        writing: whether a snapshot is being uploaded.
        tail: what a death would make others compute again.
        held: whether it waits for its upload, since its tail is as long as it may be.
        write_began_at, write_after: monotonic time of the last upload's begin, and before which the next is not begun;
            the latter grows while uploads fail.
        void: the lease was lost; nothing of this may be used any more.
    """

    run: Run
    lease: Lease
    model: ResidentModel | None
    state: RunState | None
    state_seq: int
    snapshot_seq: int
    model_error: str | None = None
    queue: deque[Queued] = field(default_factory=deque)
    gradients_failed: bool = False
    pending: Future[Any] | None = None
    damaged: Sequence[int] = ()
    writing: bool = False
    tail: ReplayTail = field(default_factory=ReplayTail)
    held: bool = False
    write_began_at: float = 0.0
    write_after: float = 0.0
    write_failures: int = 0
    void: bool = False
    without_client: bool = False
    """Whether its client is gone: what is queued is executed, and then it is parked at once."""
    may_have_more: bool = True
    """Set when the journal may hold operations that are not in `queue` yet."""
    idle: threading.Event = field(default_factory=threading.Event)
    """Set while nothing is to be done for it."""
    used_at: float = field(default_factory=time.monotonic)

    @property
    def id(self) -> str:
        """The run's id."""
        return self.run.id

    @property
    def fetched_seq(self) -> int:
        """The last operation in memory."""
        return self.queue[-1].operation.seq if self.queue else self.state_seq

    @property
    def is_ready(self) -> bool:
        """Whether its next operation can be executed now."""
        return bool(self.queue) and (self.pending is None or self.pending.done())

    @property
    def is_idle(self) -> bool:
        """Whether nothing is to be done for it, as far as is known here."""
        return not self.queue and not self.may_have_more

    @property
    def is_dirty(self) -> bool:
        """Whether its state is newer than its newest snapshot."""
        return self.state is not None and self.snapshot_seq < self.state_seq

    def put_aside(self) -> None:
        """Forget what waits for it, as if there were nothing to do, until it is announced again."""
        self.queue.clear()
        self.may_have_more = False
