"""One transaction per batch: outcomes, state version and usage, with the epoch checked for each run by itself.

A run whose lease was lost is left out whole, its usage too. When it is unknown whether a commit took effect, the run's
state version is read back before anything else is done with the state in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import structlog
from sqlalchemy import Connection

from billing.budgets import Budget
from billing.charging import Bill
from billing.usage import Usage
from jobs import operations
from jobs.operations import Category, Failure, Outcome
from storage import claims, failpoints, journal, keys, leases, payloads
from storage.checkpoints import CheckpointExistsError
from storage.errors import (
    ClaimLostError,
    LeaseLostError,
    UploadGoneError,
)
from storage.failpoints import Point
from storage.journal import Operation, Refusal
from storage.leases import Lease
from storage.open import Storage
from storage.payloads import Stored
from storage.retry import do_nothing, retrying
from storage.runs import Run, SamplingSession
from worker.work_meter import WorkMeter

log = structlog.get_logger()


@dataclass(frozen=True, eq=False)
class Done:
    """One operation that has been executed, or was found failed when its turn came.

    Attributes:
        outcome: None for an operation that was failed already when its turn came.
        usage: what went into it; billed only if it completes.
        publish: rows to be written in the same transaction, e.g. a checkpoint's.
    """

    operation: Operation
    outcome: Outcome | None
    usage: Usage | None = None
    publish: Callable[[Connection], None] | None = None

    @property
    def device_ns(self) -> int:
        """Device time that went into it."""
        return 0 if self.usage is None else self.usage.device_ns


@dataclass(frozen=True, eq=False)
class RunCommit:
    """What a turn did for one run: its operations in `seq` order."""

    run: Run
    lease: Lease
    done: Sequence[Done]

    @property
    def state_seq(self) -> int:
        """The state version that this commit leads to."""
        return self.done[-1].operation.seq

    @property
    def device_ns(self) -> int:
        """Device time that went into it."""
        return sum(done.device_ns for done in self.done)


@dataclass(frozen=True, eq=False)
class SampleCommit:
    """A sample that was drawn or failed."""

    operation: Operation
    session: SamplingSession
    outcome: Outcome
    usage: Usage


class Committer:
    """Writes what was computed.

    Attributes:
        on_wait: called whenever database or object store does not answer and is asked again: this is no hanging.
        on_spent: called after a commit with the budgets it has charged that pause what they cover, if there are any.
    """

    def __init__(
        self, storage: Storage, meter: WorkMeter, *, worker_id: str, publish: Callable[[Sequence[str]], None]
    ) -> None:
        self._storage = storage
        self._meter = meter
        self._worker_id = worker_id
        self._publish = publish
        self.on_wait: Callable[[], None] = do_nothing
        self.on_spent: Callable[[Sequence[Budget]], None] = lambda _: None

    def commit_runs(self, commits: Sequence[RunCommit]) -> set[str]:
        """Commit a turn's training operations.

        Returns:
            Runs of which nothing was written: their lease was lost, or this worker was stopped for so long that what it
            had uploaded was swept away. Their state in memory is void, and whoever takes them over computes again.
        """
        commits = sorted(commits, key=lambda commit: commit.run.id)  # as `leases.renew` does: no deadlocks
        stored = [[self._store(done) for done in commit.done] for commit in commits]
        lost: set[str] = set()
        spent: dict[int, Budget] = {}  # over all tries: one may have taken effect without telling

        def write(tx: Connection) -> None:
            if self._meter.took_effect(tx):
                return
            lost.clear()
            bill, unbilled_ns = Bill(tx, now=self._storage.database.now(tx)), 0
            for commit, outcomes in zip(commits, stored, strict=True):
                try:
                    unbilled_ns += self._write_run(tx, commit, outcomes, bill)
                except LeaseLostError as error:
                    log.warning("commit_discarded", run=commit.run.id, epoch=error.epoch, holder=error.holder)
                    lost.add(commit.run.id)
                    unbilled_ns += commit.device_ns
            spent.update((budget.id, budget) for budget in bill.settle())
            self._meter.write(tx, unbilled_ns=unbilled_ns)
            failpoints.reach(Point.COMMIT_WRITTEN)

        try:
            self._until_known(write)
        except UploadGoneError as error:
            log.error("commit_discarded", key=error.key, runs=[commit.run.id for commit in commits])
            self._meter.waste(sum(commit.device_ns for commit in commits))
            return {commit.run.id for commit in commits}
        failpoints.reach(Point.COMMITTED)
        self._tell_spent(list(spent.values()))
        kept = (commit for commit in commits if commit.run.id not in lost)
        self._publish(
            [done.operation.request_id for commit in kept for done in commit.done if done.outcome is not None]
        )
        failpoints.reach(Point.OUTCOMES_TOLD)
        return lost

    def commit_samples(self, commits: Sequence[SampleCommit]) -> set[str]:
        """Commit samples.

        Returns:
            Request ids of those that were discarded, their usage too: their claim was lost, they had been cancelled, or
            their upload was swept away.
        """
        failpoints.reach(Point.SAMPLES_DRAWN)
        commits = sorted(commits, key=lambda commit: commit.operation.id)  # as claims are locked: no deadlocks
        stored = [self._store_outcome(commit.operation.request_id, commit.outcome) for commit in commits]
        discarded: set[str] = set()
        spent: dict[int, Budget] = {}  # over all tries: one may have taken effect without telling

        def write(tx: Connection) -> None:
            if self._meter.took_effect(tx):
                return
            discarded.clear()
            bill, unbilled_ns = Bill(tx, now=self._storage.database.now(tx)), 0
            for commit, outcome in zip(commits, stored, strict=True):
                try:
                    with tx.begin_nested():
                        unbilled_ns += self._write_sample(tx, commit, outcome, bill)
                except (ClaimLostError, UploadGoneError) as error:
                    log.warning("sample_discarded", request=commit.operation.request_id, reason=str(error))
                    discarded.add(commit.operation.request_id)
                    unbilled_ns += commit.usage.device_ns
            spent.update((budget.id, budget) for budget in bill.settle())
            self._meter.write(tx, unbilled_ns=unbilled_ns)
            failpoints.reach(Point.SAMPLE_COMMIT_WRITTEN)

        self._until_known(write)
        failpoints.reach(Point.SAMPLES_COMMITTED)
        self._tell_spent(list(spent.values()))
        self._publish([commit.operation.request_id for commit in commits])
        return discarded

    def _tell_spent(self, spent: Sequence[Budget]) -> None:
        if spent:
            self.on_spent(spent)

    def _store(self, done: Done) -> Stored:
        if done.outcome is None:
            return Stored()
        return self._store_outcome(done.operation.request_id, done.outcome)

    def _store_outcome(self, request_id: str, outcome: Outcome) -> Stored:
        if isinstance(outcome, Failure):
            return Stored()
        encoded = operations.encode(outcome)
        return retrying(lambda: self._storage.payloads.put(encoded, keys.result_key(request_id)), on_wait=self.on_wait)

    def _until_known(self, write: Callable[[Connection], None]) -> None:
        """Run a transaction until its effect is certain; `write` reads back what an earlier try may have done."""

        def attempt() -> None:
            with self._storage.database.begin() as tx:
                write(tx)

        retrying(attempt, on_wait=self.on_wait)
        self._meter.told()

    def _write_run(self, tx: Connection, commit: RunCommit, outcomes: Iterable[Stored], bill: Bill) -> int:
        """Write what a run's operations came to; returns device time that is not billed."""
        if leases.committed_seq(tx, commit.lease) >= commit.state_seq:
            return 0  # an earlier try of this very commit took effect
        unbilled_ns = 0
        leases.advance(tx, commit.lease, state_seq=commit.state_seq)
        now = self._storage.database.now(tx)
        for done, stored in zip(commit.done, outcomes, strict=True):
            if done.outcome is None:
                continue
            failure = done.outcome if isinstance(done.outcome, Failure) else self._complete(tx, done, stored)
            if failure is not None:
                refusal = Refusal(failure.error, failure.category)
                journal.fail(tx, done.operation, refusal, worker_id=self._worker_id, now=now)
                unbilled_ns += done.device_ns
                bill.end(done.operation)
            elif done.usage is not None:
                bill.add(done.usage, done.operation, session_id=commit.run.session_id, run_id=commit.run.id)
        return unbilled_ns

    def _complete(self, tx: Connection, done: Done, stored: Stored) -> Failure | None:
        """Write outcome and published rows; a name that is taken fails the operation alone."""
        try:
            with tx.begin_nested():
                if done.publish is not None:
                    done.publish(tx)
                payloads.name(tx, stored)
                now = self._storage.database.now(tx)
                journal.complete(tx, done.operation, stored, worker_id=self._worker_id, now=now)
        except CheckpointExistsError as error:
            return Failure(str(error), Category.USER)
        return None

    def _write_sample(self, tx: Connection, commit: SampleCommit, stored: Stored, bill: Bill) -> int:
        """Write what a sample came to; returns device time that is not billed."""
        operation = commit.operation
        written = journal.get_operation(tx, operation.request_id)
        decided = written.status in (journal.Status.COMPLETED, journal.Status.FAILED)
        if decided and (written.attempts, written.worker_id) == (operation.attempts, self._worker_id):
            return 0  # an earlier try of this very commit took effect
        claims.check_claim(tx, operation, worker_id=self._worker_id)
        now = self._storage.database.now(tx)
        if isinstance(commit.outcome, Failure):
            refusal = Refusal(commit.outcome.error, commit.outcome.category)
            journal.fail(tx, operation, refusal, worker_id=self._worker_id, now=now)
            bill.end(operation)
            return commit.usage.device_ns
        payloads.name(tx, stored)
        journal.complete(tx, operation, stored, worker_id=self._worker_id, now=now)
        bill.add(commit.usage, operation, session_id=commit.session.session_id, run_id=commit.session.run_id)
        return 0
