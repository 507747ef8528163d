"""A history of journal, leases, samples and objects, step by step: clients, workers that die and come back, sweepers.

Each rule is something that one process does between two moments at which others may do anything. What a worker knows
(its lease, the state it believes in, what it has computed) is kept from rule to rule, and goes stale as it would.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sqlalchemy import Connection, select

from billing.usage import Usage
from jobs import sweeper as jobs_sweeper
from jobs.cancel import cancel_sample
from jobs.operations import Failure, OptimStepOutcome, Outcome
from storage import billing_tables, claims, deaths, journal, keys, leases, payloads, runs, snapshots, sweeper, tables
from storage.errors import DatabaseUnavailableError, LeaseLostError, RowNotFoundError, UploadGoneError
from storage.journal import Operation, Refusal
from storage.leases import Lease
from storage.open import Storage
from storage.payloads import Stored
from storage.runs import Run
from storage.suspects import Cause
from tests.factories import SHA256, make_run, make_sampling_session, make_session, make_usage
from tests.properties import invariants
from tests.properties.invariants import Book
from tests.worker.stand_ins import make_meter
from worker.commit import Committer, Done, RunCommit, SampleCommit

LEASE_S = 10.0
GAP_TIMEOUT_S = 30.0
RETENTION_S = 60.0
FOR_EVER_S = 1e6
SEQS = st.integers(0, 5)
WORKERS = st.sampled_from(["a", "b", "c"])
PICKS = st.integers(0, 2**16)
ANSWERS = st.lists(st.sampled_from(["before", "after"]), max_size=2)
KINDS = st.sampled_from(["forward_backward", "optim_step"])
BAD = Refusal("change this", "user")


@dataclass(eq=False)
class Held:
    """A lease as a worker has it in memory, stale or not, and the last state it has committed under it."""

    run: Run
    lease: Lease
    seq: int
    computed: list[Done] = field(default_factory=list)


@dataclass(frozen=True)
class Snapshot:
    """An object that was put, and is to be named."""

    held: Held
    seq: int
    key: str


@dataclass(frozen=True)
class Submission:
    """A payload that was put, and whose row is to be written."""

    owner: Run | None
    seq: int
    kind: str
    data: bytes
    stored: Stored
    refusal: Refusal | None


class JournalMachine(RuleBasedStateMachine):
    """Two runs, a sampling session, three workers.

    Args:
        storage: with nothing in it.
    """

    def __init__(self, storage: Storage) -> None:
        super().__init__()
        self.storage = storage
        self.database = storage.database
        self.book = Book()
        self.held: list[Held] = []
        self.claims: list[tuple[str, Operation]] = []
        self.submissions: list[Submission] = []
        self.uploads: list[Snapshot] = []
        with self.database.begin() as tx:
            session = make_session(tx)
            self.runs = [make_run(tx, session=session, model_seq_id=place) for place in range(2)]
            self.sampling = make_sampling_session(tx, session)

    # --------------------------------------------------------------------------------------------------------- clients

    @rule(place=st.integers(0, 2), seq=SEQS, kind=KINDS, size=st.sampled_from([10, 400]), refused=st.booleans())
    def put_payload(self, place: int, seq: int, kind: str, size: int, refused: bool) -> None:
        """An api process stores a payload; it may be stopped before it writes the row."""
        owner = self.runs[place] if place < 2 else None
        owner_id = owner.id if owner is not None else self.sampling.id
        data = f"{owner_id}:{seq}:{len(self.book.accepted)}:".encode().ljust(size, b"x")
        stored = self.storage.payloads.put(data, keys.payload_key(owner_id, seq))
        refusal = BAD if refused and seq % 2 else None
        self.submissions.append(Submission(owner, seq, kind if owner else "sample", data, stored, refusal))

    @precondition(lambda self: self.submissions)
    @rule(pick=PICKS, again=st.booleans())
    def write_row(self, pick: int, again: bool) -> None:
        """It writes the row, which makes the operation durable; a client may send the same once more."""
        one = self.submissions[pick % len(self.submissions)]
        if not again:
            self.submissions.remove(one)
        try:
            with self.database.begin() as tx:
                request_id, new = self._accept(tx, one)
                if new:
                    payloads.name(tx, one.stored)
                    self._accepted(tx, journal.get_operation(tx, request_id))
        except UploadGoneError:
            return  # it would put it once more: another rule does
        assert new == (request_id not in self.book.accepted) or not self._is_known(request_id)
        if new:
            self.book.accepted[request_id] = one.data

    def _accepted(self, tx: Connection, operation: Operation) -> None:
        """What else belongs into the transaction that accepts."""

    def _is_known(self, request_id: str) -> bool:
        """Whether a client was told of it; a gap that was closed is there without."""
        return request_id in self.book.accepted

    def _accept(self, tx: Connection, one: Submission) -> tuple[str, bool]:
        now = self.database.now(tx)
        if one.owner is None:
            return journal.accept_sample(
                tx,
                account_id=self.sampling.account_id,
                sampling_session_id=self.sampling.id,
                seq=one.seq,
                kind=one.kind,
                base_model=self.sampling.base_model,
                payload=one.stored,
                num_sequences=1,
                now=now,
                refusal=one.refusal,
            )
        return journal.accept_training(
            tx,
            account_id=one.owner.account_id,
            run_id=one.owner.id,
            seq=one.seq,
            kind=one.kind,
            base_model=one.owner.base_model,
            payload=one.stored,
            now=now,
            refusal=one.refusal,
            gradients=one.kind == "forward_backward",
        )

    @precondition(lambda self: self.book.accepted)
    @rule(pick=PICKS)
    def fetch_outcome(self, pick: int) -> None:
        """A client is told of a failure."""
        request_id = sorted(self.book.accepted)[pick % len(self.book.accepted)]
        with self.database.begin() as tx:
            journal.note_failure_known(tx, journal.get_operation(tx, request_id))

    @rule(seq=SEQS)
    def cancel(self, seq: int) -> None:
        """A client cancels a sample, if it is there."""
        with contextlib.suppress(RowNotFoundError), self.database.begin() as tx:
            now = self.database.now(tx)
            cancel_sample(tx, f"{self.sampling.id}:{seq}", account_id=self.sampling.account_id, now=now)

    # ---------------------------------------------------------------------------------------------------------- leases

    @rule(worker=WORKERS, place=st.integers(0, 1))
    def acquire(self, worker: str, place: int) -> None:
        """A worker asks for a lease, and gets it if nobody holds it."""
        run_id = self.runs[place].id
        now = self.storage.database.clock.now()
        before = self._run(run_id)
        is_free = before.lease_worker in (None, worker) or before.lease_expires_at < now
        try:
            self.held.append(self._acquire(worker, run_id))
        except LeaseLostError:
            assert not is_free
            return
        assert is_free
        assert self._run(run_id).lease_epoch > before.lease_epoch

    def _acquire(self, worker: str, run_id: str) -> Held:
        with self.database.begin() as tx:
            now, expires_at = self.database.now(tx), self.database.after(tx, LEASE_S)
            lease = leases.acquire(tx, run_id, worker_id=worker, now=now, expires_at=expires_at)
            run = runs.get_run(tx, run_id)
        return Held(run, lease, run.state_seq)

    @precondition(lambda self: self.held)
    @rule(pick=PICKS)
    def renew(self, pick: int) -> None:
        """A worker renews; it is told if the lease is another's."""
        held = self.held[pick % len(self.held)]
        is_current = self._is_current(held)
        with self.database.begin() as tx:
            kept = leases.renew(tx, [held.lease], expires_at=self.database.after(tx, LEASE_S))
        assert (held.run.id in kept) == is_current

    @precondition(lambda self: self.held)
    @rule(pick=PICKS)
    def release(self, pick: int) -> None:
        """A worker gives a lease up; a stale one frees nothing."""
        held = self.held.pop(pick % len(self.held))
        with self._unchanged_unless(self._is_current(held), held), self.database.begin() as tx:
            leases.release(tx, held.lease)

    @rule(worker=WORKERS, cause=st.sampled_from(Cause))
    def is_thought_dead(self, worker: str, cause: Cause) -> None:
        """A supervisor frees what a worker held; should that live, it goes on as a zombie."""
        with self.database.begin() as tx:
            deaths.note_death(tx, worker, cause, now=self.database.now(tx))
        assert not any(held.lease.worker_id == worker and self._is_current(held) for held in self.held)

    @rule(worker=WORKERS)
    def die(self, worker: str) -> None:
        """A worker forgets everything; nobody is told."""
        self.held = [held for held in self.held if held.lease.worker_id != worker]
        self.claims = [claim for claim in self.claims if claim[0] != worker]
        self.uploads = [upload for upload in self.uploads if upload.held in self.held]

    # -------------------------------------------------------------------------------------------------------- training

    @precondition(lambda self: any(not held.computed for held in self.held))
    @rule(pick=PICKS, num=st.integers(1, 3), large=st.booleans(), fails=st.booleans())
    def compute(self, pick: int, num: int, large: bool, fails: bool) -> None:
        """A worker begins with what follows the state in its memory, whether its lease stands or not."""
        idle = [held for held in self.held if not held.computed]
        held = idle[pick % len(idle)]
        with self.database.begin() as tx:
            following = journal.next_in_order(tx, held.run.id, after_seq=held.seq, limit=num)
            open_ids = [operation.id for operation in following if operation.status in journal.OPEN]
            now = self.database.now(tx)
            journal.start(tx, open_ids, worker_id=held.lease.worker_id, now=now, alone=len(open_ids) == 1)
        held.computed = [self._done(operation, large=large, fails=fails) for operation in following]

    def _done(self, operation: Operation, *, large: bool, fails: bool) -> Done:
        if operation.status == "failed":
            return Done(operation, None)
        if fails and operation.seq % 2:
            return Done(operation, Failure("it cannot be computed"))
        metrics = {f"metric-{number}": float(number) for number in range(60 if large else 1)}
        return Done(operation, OptimStepOutcome(metrics), self._usage(operation))

    def _usage(self, operation: Operation) -> Usage:
        """What executing it has used."""
        del operation
        return make_usage()

    @precondition(lambda self: any(held.computed for held in self.held))
    @rule(pick=PICKS, answers=ANSWERS, thief=st.none() | WORKERS)
    def commit(self, pick: int, answers: list[str], thief: str | None) -> None:
        """A worker commits; the database may not answer, and the lease may be lost before it is asked again."""
        busy = [held for held in self.held if held.computed]
        held = busy[pick % len(busy)]
        is_current = self._is_current(held)
        committer = self._committer(held.lease.worker_id, answers, lambda: self._steal(thief, held.run.id))
        with self._unchanged_unless(is_current, held):
            lost = committer.commit_runs([RunCommit(held.run, held.lease, held.computed)])
        if not is_current:
            assert lost == {held.run.id}, "a stale lease has committed"
        if lost:
            self.held.remove(held)
        else:
            held.seq, held.computed = held.computed[-1].operation.seq, []
            assert self._run(held.run.id).state_seq >= held.seq

    def _committer(self, worker: str, answers: list[str], meanwhile: Callable[[], None]) -> Committer:
        unsure = dataclasses.replace(self.storage, database=_Unsure(self.storage, answers, meanwhile))  # type: ignore[arg-type]
        return Committer(unsure, make_meter(worker), worker_id=worker, publish=lambda _: None)

    def _steal(self, thief: str | None, run_id: str) -> None:
        if thief is not None:
            self.storage.database.clock.advance(LEASE_S + 1)  # type: ignore[attr-defined]
            with contextlib.suppress(LeaseLostError):
                self.held.append(self._acquire(thief, run_id))

    # ------------------------------------------------------------------------------------------------------- snapshots

    @precondition(lambda self: any(held.seq >= 0 for held in self.held))
    @rule(pick=PICKS)
    def put_snapshot(self, pick: int) -> None:
        """A worker uploads its state; it may be stopped before it names it."""
        able = [held for held in self.held if held.seq >= 0]
        held = able[pick % len(able)]
        key = keys.snapshot_key(held.run.id, held.seq)
        self.storage.payloads.put_object(b"state", key)
        self.uploads.append(Snapshot(held, held.seq, key))

    @precondition(lambda self: self.uploads)
    @rule(pick=PICKS, again=st.booleans())
    def name_snapshot(self, pick: int, again: bool) -> None:
        """A worker names what it has put, or does so once more because it does not know whether it has."""
        one = self.uploads[pick % len(self.uploads)]
        if not again:
            self.uploads.remove(one)
        is_current = self._is_current(one.held)
        before = self._snapshots(one.held.run.id)
        try:
            with self.database.begin() as tx:
                snapshots.add(
                    tx,
                    one.held.lease,
                    seq=one.seq,
                    object_key=one.key,
                    data_sha256=SHA256,
                    size_bytes=5,
                    now=self.database.now(tx),
                )
        except LeaseLostError:
            assert not is_current
        except UploadGoneError:
            assert is_current
        else:
            assert is_current, "a stale lease has named a snapshot"
            return
        assert self._snapshots(one.held.run.id) == before

    # --------------------------------------------------------------------------------------------------------- samples

    @rule(worker=WORKERS, limit=st.integers(1, 3), suspect=st.booleans())
    def claim(self, worker: str, limit: int, suspect: bool) -> None:
        """A worker claims samples."""
        with self.database.begin() as tx:
            times = {"now": self.database.now(tx), "expires_at": self.database.after(tx, LEASE_S)}
            if suspect:
                found = claims.claim_suspect(tx, worker_id=worker, skip_locked=False, **times)
                claimed: Sequence[Operation] = [] if found is None else [found]
            else:
                claimed = claims.claim_samples(tx, worker_id=worker, limit=limit, skip_locked=False, **times)
        self.claims.extend((worker, operation) for operation in claimed)

    @precondition(lambda self: self.claims)
    @rule(pick=PICKS, answers=ANSWERS, large=st.booleans(), fails=st.booleans(), again=st.booleans())
    def commit_sample(self, pick: int, answers: list[str], large: bool, fails: bool, again: bool) -> None:
        """A worker commits a sample, whether its claim stands or not."""
        worker, operation = claim = self.claims[pick % len(self.claims)]
        if not again:
            self.claims.remove(claim)
        before = self._operation(operation.id)
        stands = (before.status, before.worker_id, before.attempts) == ("running", worker, operation.attempts)
        outcome: Outcome = self._done(operation, large=large, fails=fails).outcome or Failure("none")
        commit = SampleCommit(operation, self.sampling, outcome, self._usage(operation))
        self._committer(worker, answers, lambda: None).commit_samples([commit])
        after = self._operation(operation.id)
        if stands:
            assert after.status in ("completed", "failed")
        else:
            assert after == before, "a claim that does not stand has changed a sample"

    @rule(worker=WORKERS)
    def renew_claims(self, worker: str) -> None:
        """A worker keeps its samples."""
        mine = [operation.id for holder, operation in self.claims if holder == worker]
        with self.database.begin() as tx:
            claims.renew_claims(tx, mine, worker_id=worker, expires_at=self.database.after(tx, LEASE_S))

    # -------------------------------------------------------------------------------------------------- time, sweepers

    @rule(seconds=st.sampled_from([1.0, LEASE_S + 1, GAP_TIMEOUT_S + 1, RETENTION_S + 1]))
    def wait(self, seconds: float) -> None:
        """Time passes: leases, claims, uploads and outcomes expire."""
        self.storage.database.clock.advance(seconds)  # type: ignore[attr-defined]

    @rule()
    def sweep_work(self) -> None:
        """The sweeper of stalled work: expired claims are free again, gaps that timed out are closed."""
        with self.database.begin() as tx:
            claims.release_claims(tx, now=self.database.now(tx))
        self._close_gaps()

    def _close_gaps(self) -> Sequence[tuple[str, int]]:
        return jobs_sweeper.close_gaps(self.database, lambda _: None, gap_timeout_s=GAP_TIMEOUT_S)

    @rule()
    def sweep_objects(self) -> None:
        """The sweeper of outcomes and objects."""
        sweeper.sweep(
            self.database,
            self.storage.objects,
            result_retention_s=RETENTION_S,
            sampling_session_idle_s=FOR_EVER_S,
            pass_s=FOR_EVER_S,
        )

    # ------------------------------------------------------------------------------------------------------ what holds

    @invariant()
    def everything_holds(self) -> None:
        """After every step."""
        invariants.check(self.storage, self.book)

    def teardown(self) -> None:
        """From wherever a history has led, everything accepted is executed, and the store is left tidy."""
        for worker in ("a", "b", "c"):
            self.is_thought_dead(worker, Cause.STOPPED)
        self.wait(GAP_TIMEOUT_S + 1)
        self.sweep_work()
        while self._close_gaps():
            pass  # a pass closes one gap of each run
        for run in self.runs:
            self.held = [self._acquire("last", run.id)]
            while self._take_turn(self.held[0]):
                pass
        self.claims = []
        for suspect in (False, True, True, True, True, True, True):
            self.claim("last", 3 if suspect else 6, suspect)
        while self.claims:
            self.commit_sample(0, [], large=False, fails=False, again=False)
        self.everything_holds()
        statuses = self._statuses()
        assert all(statuses[request_id] in invariants.FINAL for request_id in self.book.accepted), statuses
        for _ in range(4):
            self.wait(RETENTION_S + 1)
            self.sweep_objects()
        self.everything_holds()
        invariants.check_swept(self.storage)

    def _take_turn(self, held: Held) -> bool:
        """Execute what comes next; returns whether there was anything."""
        self.compute(0, 3, large=False, fails=False)
        if not held.computed:
            return False
        self.commit(0, [], None)
        return True

    # --------------------------------------------------------------------------------------------------------- looking

    @contextlib.contextmanager
    def _unchanged_unless(self, may_change: bool, held: Held) -> Iterator[None]:
        before = self._everything_of(held.run.id)
        yield
        assert may_change or self._everything_of(held.run.id) == before, "a stale epoch has changed something"

    def _everything_of(self, run_id: str) -> list[Any]:
        operation = tables.operation
        with self.database.read() as tx:
            of_run = tx.execute(select(operation).where(operation.c.run_id == run_id).order_by(operation.c.id)).all()
            billed = tx.execute(select(billing_tables.usage_record.c.operation_id)).scalars()
            return [*of_run, *tx.execute(select(tables.run).where(tables.run.c.id == run_id)).all(), sorted(billed)]

    def _is_current(self, held: Held) -> bool:
        run = self._run(held.run.id)
        return (run.lease_epoch, run.lease_worker) == (held.lease.epoch, held.lease.worker_id)

    def _run(self, run_id: str) -> Any:
        with self.database.read() as tx:
            return tx.execute(select(tables.run).where(tables.run.c.id == run_id)).one()

    def _operation(self, operation_id: int) -> Any:
        with self.database.read() as tx:
            return tx.execute(select(tables.operation).where(tables.operation.c.id == operation_id)).one()

    def _snapshots(self, run_id: str) -> Sequence[Any]:
        with self.database.read() as tx:
            return snapshots.newest_first(tx, run_id)

    def _statuses(self) -> dict[str, str]:
        with self.database.read() as tx:
            return {row.request_id: row.status for row in tx.execute(select(tables.operation))}


class _Unsure:
    """A database whose first commits take effect (`after`), or do not (`before`), without telling."""

    def __init__(self, storage: Storage, answers: Sequence[str], meanwhile: Callable[[], None]) -> None:
        self._database = storage.database
        self._answers = list(answers)
        self._meanwhile = meanwhile

    @contextlib.contextmanager
    def begin(self) -> Iterator[Connection]:
        """As the real one, but for the answer."""
        answer = self._answers.pop(0) if self._answers else "told"
        try:
            with self._database.begin() as tx:
                yield tx
                if answer == "before":
                    raise DatabaseUnavailableError("the database", "connection lost before the commit")
            if answer == "after":
                raise DatabaseUnavailableError("the database", "connection lost after the commit")
        finally:
            if answer != "told":
                self._meanwhile()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)
