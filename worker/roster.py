"""The runs this worker holds, seen by all its threads: expected (being fetched or replayed), or in memory.

What always holds: from the moment a lease is taken until it is given up the run is in here, so its lease is renewed and
no second task of this worker takes the run over again.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

from storage.leases import Lease
from storage.runs import Run
from worker import faults
from worker.active_run import ActiveRun
from worker.takeover import Takeover

LOOK_S = 0.01
IDLE_LOOK_S = 0.25
FAILURES_MAX = 3
PAUSE_FIRST_S = 1.0
PAUSE_MOST_S = 30.0


@dataclass(frozen=True)
class Expected:
    """A run whose lease was taken and which is not in memory yet.

    Attributes:
        is_suspect: its replay must have no company.
        has_arrived: it has been fetched, and waits for its replay.
    """

    lease: Lease
    base_model: str
    is_suspect: bool
    has_arrived: bool = False


@dataclass
class Failures:
    """Why a run could not be taken over.

    Attributes:
        epoch: of the lease it was tried under last; whatever another worker has done since makes all this void.
        reasons: of failures that will come again.
        num_in_a_row: of all failures, storage that is away included.
        not_before: monotonic time of the next attempt.
    """

    epoch: int
    reasons: list[str] = field(default_factory=list)
    num_in_a_row: int = 0
    not_before: float = 0.0


class Roster:
    """Runs by id, under one lock.

    Args:
        wake: called when the engine has something to do.
        fetched_max: how many runs may be fetched at once.
        expected_max: how many may be on their way into memory, being fetched or waiting for their replay.
    """

    def __init__(self, wake: Callable[[], None], *, fetched_max: int, expected_max: int) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._fetched_max = fetched_max
        self._expected_max = expected_max
        self._room = threading.Condition(self._lock)
        self._num_reserved = 0
        self._expected: dict[str, Expected] = {}
        self._arrived: list[Takeover] = []
        self._runs: dict[str, ActiveRun] = {}
        self._failures: dict[str, Failures] = {}

    # --------------------------------------------------------------------------------------------- from other threads

    @contextlib.contextmanager
    def room(self, *, timeout_s: float) -> Iterator[bool]:
        """Room for one more run until it is expected, or not to be had; False if time ran out before there was any."""
        with self._lock:
            has_room = self._room.wait_for(self._has_room, timeout_s)
            self._num_reserved += has_room
        try:
            yield has_room
        finally:
            with self._lock:
                self._num_reserved -= has_room
                self._room.notify()

    def expect(self, run: Run, lease: Lease) -> None:
        """A run's lease has been taken; it will arrive, or be forgotten."""
        with self._lock:
            self._expected[run.id] = Expected(lease, run.base_model, run.replays_alone)

    def arrive(self, takeover: Takeover) -> None:
        """An expected run has been fetched and may be replayed."""
        with self._lock:
            self._arrived.append(takeover)
            expected = self._expected.get(takeover.run.id)
            if expected is not None and expected.lease == takeover.lease:
                self._expected[takeover.run.id] = replace(expected, has_arrived=True)
            self._room.notify()
        self._wake()

    def forget(self, lease: Lease, error: Exception) -> None:
        """An expected run could not be fetched or replayed; remembers why. What may pass is tried for ever.

        Want of memory and a lost device may: there is more room later, or on another worker.
        """
        with self._lock:
            expected = self._expected.get(lease.run_id)
            if expected is not None and expected.lease == lease:
                self._expect_no_more(lease.run_id)
            failures = self._failures.get(lease.run_id)
            if failures is None or lease.epoch != failures.epoch + 1:
                failures = self._failures[lease.run_id] = Failures(lease.epoch)
            failures.epoch = lease.epoch
            failures.num_in_a_row += 1
            if not (getattr(error, "retryable", False) or faults.may_pass(error)):
                failures.reasons.append(str(error))
            pause_s = min(PAUSE_FIRST_S * 2.0 ** (failures.num_in_a_row - 1), PAUSE_MOST_S)
            failures.not_before = time.monotonic() + pause_s

    def pauses(self, run_id: str) -> bool:
        """Whether a run's takeover failed so lately that it is not tried again yet."""
        with self._lock:
            failures = self._failures.get(run_id)
            return failures is not None and time.monotonic() < failures.not_before

    def hopeless(self, lease: Lease) -> str | None:
        """Why a run's takeover has failed too often, here and nowhere else since, to be tried again; or None."""
        with self._lock:
            failures = self._failures.get(lease.run_id)
            if failures is None or lease.epoch != failures.epoch + 1:
                return None
            return failures.reasons[-1] if len(failures.reasons) >= FAILURES_MAX else None

    def expects(self, lease: Lease) -> bool:
        """Whether a run is still to be brought into memory under this lease."""
        with self._lock:
            expected = self._expected.get(lease.run_id)
            return expected is not None and expected.lease == lease

    def notify(self, run_id: str) -> bool:
        """Say that a run may have more operations; False if this worker does not have it."""
        with self._lock:
            if run_id in self._expected:
                return True  # its operations are read after it has come into memory
            run = self._runs.get(run_id)
            if run is None or run.void:
                return False
            run.may_have_more = True
            run.idle.clear()
        self._wake()
        return True

    def wait_idle(self, run_id: str, *, timeout_s: float, leaving: threading.Event) -> bool:
        """Wait until nothing is left to do for a run; False if time ran out first, or the worker is leaving."""
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0 and not leaving.is_set():
            with self._lock:
                run, expected = self._runs.get(run_id), run_id in self._expected
            if run is None and not expected:
                return True
            if run is None:
                time.sleep(min(left_s, LOOK_S))
            elif run.idle.wait(min(left_s, IDLE_LOOK_S)):
                return True
        return False

    def leases(self) -> list[Lease]:
        """Everything that is to be renewed."""
        with self._lock:
            held = [run.lease for run in self._runs.values() if not run.void]
            return held + [expected.lease for expected in self._expected.values()]

    def drop_all_but(self, kept: Collection[str], asked: Sequence[Lease]) -> list[Lease]:
        """Of the leases that were to be renewed, note those that were lost; returns them."""
        lost = [lease for lease in asked if lease.run_id not in kept]
        with self._lock:
            for lease in lost:
                run = self._runs.get(lease.run_id)
                if run is not None and run.lease == lease:
                    run.void = True
                expected = self._expected.get(lease.run_id)
                if expected is not None and expected.lease == lease:
                    self._expect_no_more(lease.run_id)
        return lost

    def note_without_client(self, run_ids: Collection[str]) -> None:
        """These runs' clients are gone; those of all others are there."""
        with self._lock:
            for run in self._runs.values():
                run.without_client = run.id in run_ids

    def base_models(self) -> set[str]:
        """Base models that must stay in memory."""
        with self._lock:
            expected = {expected.base_model for expected in self._expected.values()}
            return expected | {run.run.base_model for run in self._runs.values()}

    # ------------------------------------------------------------------------------------------ on the engine's thread

    @property
    def is_fetching(self) -> bool:
        """Whether a run is being fetched."""
        with self._lock:
            return any(not expected.has_arrived for expected in self._expected.values())

    def take_arrived(self) -> list[Takeover]:
        """Runs to be replayed now; they stay expected until they are admitted."""
        with self._lock:
            arrived, self._arrived = self._arrived, []
        return arrived

    def admit(self, run: ActiveRun) -> bool:
        """A run has been replayed; False if its lease is not the one expected any more."""
        with self._lock:
            expected = self._expected.get(run.id)
            if expected is None or expected.lease != run.lease:
                return False
            self._expect_no_more(run.id)
            self._failures.pop(run.id, None)
            self._runs[run.id] = run
        return True

    def active(self) -> list[ActiveRun]:
        """Runs in memory whose lease stands."""
        with self._lock:
            return [run for run in self._runs.values() if not run.void]

    def remove_cold(self, *, warm_s: float, num_max: int) -> list[ActiveRun]:
        """Take out runs that are void, cold or too many, and return them: what is left of their leases is to go.

        Cold is an idle run, written back, that was not used for `warm_s` or whose client is gone.
        """
        now = time.monotonic()
        with self._lock:
            void = [run for run in self._runs.values() if run.void and not run.writing]
            for run in void:
                del self._runs[run.id]
                run.idle.set()
            for run in self._runs.values():
                if run.is_idle:
                    run.idle.set()
            idle = [run for run in self._runs.values() if run.is_idle and not run.is_dirty and not run.writing]
            surplus = len(self._runs) - num_max
            oldest_first = sorted(idle, key=lambda run: run.used_at)
            cold = [
                run
                for place, run in enumerate(oldest_first)
                if place < surplus or now - run.used_at > warm_s or run.without_client
            ]
            for run in cold:
                del self._runs[run.id]
        return void + cold

    # --------------------------------------------------------------------------------------------- under the lock

    def _has_room(self) -> bool:
        """A run whose replay must have no company lets nobody else in until it is there."""
        expected = self._expected.values()
        num_fetched = self._num_reserved + sum(not one.has_arrived for one in expected)
        num_expected = self._num_reserved + len(self._expected)
        has_room = num_fetched < self._fetched_max and num_expected < self._expected_max
        return has_room and not any(one.is_suspect for one in expected)

    def _expect_no_more(self, run_id: str) -> None:
        del self._expected[run_id]
        self._room.notify()
