"""Accepts operations: payload stored, row written, then announced. The same `seq` again gives the same request id,
also when the queue is full by then.

What is invalid is accepted too, as a failed operation whose outcome says why: its `seq` is consumed, so nothing that
follows waits for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

import structlog
from sqlalchemy import Connection

from billing import budgets
from billing.holds import OverBudgetError
from jobs import caps, operations
from jobs.backlog import Backlog, BacklogFullError
from jobs.dispatch import Announces
from jobs.operations import Body, CreateModel, Failure, Kind, LoadState, LoraConfig, Sample
from storage import failpoints, ids, journal, keys, payloads, runs
from storage.checkpoints import Checkpoint
from storage.errors import UploadGoneError
from storage.failpoints import Point
from storage.journal import Refusal, Status
from storage.open import Storage
from storage.payloads import Stored
from storage.runs import Run, SamplingSession, Session

log = structlog.get_logger()

Write = Callable[[Connection, Stored], tuple[str, bool]]
"""Writes an operation's row in a transaction; returns its request id, and whether the row is new."""

SEQ_AHEAD_MAX = 100_000
"""How far a `seq` may run ahead of what has been executed: each missing one before it may have to be closed."""


@dataclass(frozen=True)
class Accepted:
    """The durable promise: no crash loses the operation with this request id."""

    request_id: str
    run_id: str | None = None


class Submitter:
    """Accepts operations of every kind."""

    def __init__(self, storage: Storage, announcer: Announces[object], backlog: Backlog) -> None:
        self._storage = storage
        self._announcer = announcer
        self._backlog = backlog

    def create_model(
        self,
        session: Session,
        *,
        model_seq_id: int,
        base_model: str,
        lora: LoraConfig,
        optimizer: str = "adamw",
        user_metadata: Mapping[str, str] | None = None,
        failure: Failure | None = None,
    ) -> Accepted:
        """Make a run whose operation 0 draws fresh weights."""
        body = CreateModel(base_model, lora)
        return self._new_run(
            session,
            model_seq_id=model_seq_id,
            base_model=base_model,
            lora=lora,
            optimizer=optimizer,
            user_metadata=user_metadata,
            body=body,
            failure=failure,
            loads_key=None,
        )

    def create_by_load(
        self,
        session: Session,
        *,
        model_seq_id: int,
        checkpoint: Checkpoint,
        with_optimizer: bool,
        base_model: str | None = None,
        optimizer: str = "adamw",
        user_metadata: Mapping[str, str] | None = None,
        failure: Failure | None = None,
    ) -> Accepted:
        """Make a run whose operation 0 loads a checkpoint; the LoRA config is the checkpoint's."""
        lora = LoraConfig(**checkpoint.lora)
        body = LoadState(str(checkpoint.path), with_optimizer, object_key=checkpoint.object_key)
        base_model = base_model or checkpoint.base_model
        return self._new_run(
            session,
            model_seq_id=model_seq_id,
            base_model=base_model,
            lora=lora,
            optimizer=optimizer,
            user_metadata=user_metadata,
            body=body,
            failure=failure,
            loads_key=checkpoint.object_key,
        )

    def training(self, run: Run, seq: int, body: Body | Failure, *, kind: Kind) -> Accepted:
        """Accept operation `seq` of a run; a `Failure` in place of the body is recorded as its outcome.

        Raises:
            BacklogFullError: too much waits, and this `seq` has not been accepted before.
            OverBudgetError: a cap has no room for it, or for one of the run's that came before.
        """
        if seq > run.state_seq + SEQ_AHEAD_MAX:
            body = Failure(f"seq_id {seq} is too far ahead: the run is at {run.state_seq}; number requests one by one")

        def write(tx: Connection, stored: Stored) -> tuple[str, bool]:
            return journal.accept_training(
                tx,
                account_id=run.account_id,
                run_id=run.id,
                seq=seq,
                kind=kind,
                base_model=run.base_model,
                payload=stored,
                now=self._storage.database.now(tx),
                refusal=_stillborn(journal.find_operation(tx, f"{run.id}:0")) or _refusal(body),
            )

        try:
            request_id, _ = self._accept(run, seq, kind, body, write)
        except OverBudgetError as error:
            self._note_refused(error, (run.id, seq))
            raise
        self._announcer.announce_run(run.id)
        failpoints.reach(Point.ACCEPTED)
        return Accepted(request_id, run.id)

    def sample(self, session: SamplingSession, seq: int, body: Sample | Failure, *, num_samples: int) -> Accepted:
        """Accept a sample; a `Failure` in place of the body is recorded as its outcome.

        Raises:
            BacklogFullError: too much waits, and this `seq` has not been accepted before.
            OverBudgetError: a cap has no room for it.
        """
        if session.ended_at is not None:
            body = Failure("the sampling session has ended: its client was gone for long; make a new one")

        def write(tx: Connection, stored: Stored) -> tuple[str, bool]:
            return journal.accept_sample(
                tx,
                account_id=session.account_id,
                sampling_session_id=session.id,
                seq=seq,
                kind=Kind.SAMPLE,
                base_model=session.base_model,
                payload=stored,
                num_sequences=num_samples,
                now=self._storage.database.now(tx),
                refusal=_refusal(body),
            )

        try:
            request_id, new = self._accept(session, seq, Kind.SAMPLE, body, write)
        except OverBudgetError as error:
            self._note_refused(error)
            raise
        if new and not isinstance(body, Failure):
            self._announcer.announce_samples()
        failpoints.reach(Point.ACCEPTED)
        return Accepted(request_id)

    def _note_refused(self, error: OverBudgetError, place: tuple[str, int] | None = None) -> None:
        """Keep the place of what is refused in its run, and that its budget has no room."""
        database = self._storage.database
        if place is None:  # refused samples are many: most write nothing
            with database.read() as tx:
                if not _is_to_be_noted(error, database.now(tx)):
                    return
        with database.begin() as tx:
            now = database.now(tx)
            if place is not None:
                runs.note_refused(tx, *place, now=now)
            if error.budget is not None and _is_to_be_noted(error, now):
                budgets.note_refused(tx, error.budget, error.units, now=now)

    def _accept(
        self, owner: Run | SamplingSession, seq: int, kind: Kind, body: Body | Failure, write: Write
    ) -> tuple[str, bool]:
        """Take an operation if there is room; what has an outcome needs none, what is waited for less."""
        if isinstance(body, Failure):
            return self._store_and_write(None, owner, seq, None, write)
        encoded = operations.encode(body)
        try:
            with self._backlog.place(owner.account_id, kind, len(encoded)):
                return self._store_and_write(encoded, owner, seq, body, write)
        except BacklogFullError:
            known = self._find_request_id(owner, seq)
            if known is not None:
                return known, False
            if not self._is_waited_for(owner, seq):
                raise
        with self._backlog.place(owner.account_id, kind, len(encoded), waited_for=True):
            return self._store_and_write(encoded, owner, seq, body, write)

    def _find_request_id(self, owner: Run | SamplingSession, seq: int) -> str | None:
        request_id = _request_id(owner, seq)
        with self._storage.database.read() as tx:
            return request_id if journal.find_operation(tx, request_id) else None

    def _is_waited_for(self, owner: Run | SamplingSession, seq: int) -> bool:
        """Whether operations that were accepted before cannot run without this one: refused, it would block them."""
        with self._storage.database.read() as tx:
            return isinstance(owner, Run) and journal.is_overtaken(tx, owner.id, seq)

    def _store_and_write(
        self, encoded: bytes | None, owner: Run | SamplingSession, seq: int, body: Body | None, write: Write
    ) -> tuple[str, bool]:
        """Store the payload, then write the row that names it; again if the upload was swept away in between."""
        while True:
            stored = Stored()
            if encoded is not None and body is not None:
                if not self._storage.payloads.is_inline(len(encoded)):
                    known = self._look_before_the_put(owner, seq, body)
                    if known is not None:
                        return known, False
                stored = self._storage.payloads.put(encoded, keys.payload_key(owner.id, seq))
            failpoints.reach(Point.ROW_BEGUN)
            try:
                with self._storage.database.begin() as tx:
                    request_id, new = write(tx, stored)
                    if new:
                        payloads.name(tx, stored)
                    if new and body is not None:
                        caps.hold(tx, owner, request_id, body, now=self._storage.database.now(tx))
                failpoints.reach(Point.ROW_WRITTEN)
                return request_id, new
            except UploadGoneError as error:
                log.warning("upload_was_too_slow", key=error.key)

    def _look_before_the_put(self, owner: Run | SamplingSession, seq: int, body: Body) -> str | None:
        """The request id of an operation that is there already: nothing need be stored for it.

        Raises:
            OverBudgetError: a cap has no room for it; its client asks again every few seconds.
        """
        request_id = _request_id(owner, seq)
        with self._storage.database.read() as tx:
            if journal.find_operation(tx, request_id) is not None:
                return request_id
            creation = journal.find_operation(tx, f"{owner.id}:0") if isinstance(owner, Run) else None
            if _stillborn(creation) is None:
                caps.check(tx, owner, seq, body, now=self._storage.database.now(tx))
        return None

    def _new_run(
        self,
        session: Session,
        *,
        model_seq_id: int,
        base_model: str,
        lora: LoraConfig,
        optimizer: str,
        user_metadata: Mapping[str, str] | None,
        body: Body,
        failure: Failure | None,
        loads_key: str | None,
    ) -> Accepted:
        database = self._storage.database
        encoded = operations.encode(body)

        def write(tx: Connection) -> Accepted:
            run = runs.find_run_of_session(tx, session.id, model_seq_id) or runs.create_run(
                tx,
                account_id=session.account_id,
                session_id=session.id,
                model_seq_id=model_seq_id,
                base_model=base_model,
                lora=dataclasses.asdict(lora),
                optimizer=optimizer,
                user_metadata=user_metadata,
                now=database.now(tx),
            )
            request_id, _ = journal.accept_training(
                tx,
                account_id=run.account_id,
                run_id=run.id,
                seq=0,
                kind=body.kind,
                base_model=run.base_model,
                payload=Stored(inline=encoded, size_bytes=len(encoded)),
                now=database.now(tx),
                refusal=_refusal(failure),
                loads_key=loads_key,
            )
            return Accepted(request_id, run.id)

        try:
            with self._backlog.place(session.account_id, Kind.CREATE_MODEL, len(encoded)), database.begin() as tx:
                accepted = write(tx)
        except BacklogFullError:
            known = self._find_run(session, model_seq_id)
            if known is None:
                raise
            return known
        if failure is None:
            self._announcer.announce_run(str(accepted.run_id))
        return accepted

    def _find_run(self, session: Session, model_seq_id: int) -> Accepted | None:
        """What an earlier submission of the same run was answered."""
        with self._storage.database.read() as tx:
            run = runs.find_run_of_session(tx, session.id, model_seq_id)
        return None if run is None else Accepted(ids.training_request_id(run.id, 0), run.id)


def _request_id(owner: Run | SamplingSession, seq: int) -> str:
    of_run = isinstance(owner, Run)
    return ids.training_request_id(owner.id, seq) if of_run else ids.sample_request_id(owner.id, seq)


def _refusal(body: object) -> Refusal | None:
    return Refusal(body.error, body.category) if isinstance(body, Failure) else None


def _stillborn(creation: journal.Operation | None) -> Refusal | None:
    """Why a run whose operation 0 failed takes no further operations."""
    if creation is None or creation.status != Status.FAILED:
        return None
    return Refusal(f"the training run was never made: {creation.error}", "user")


def _is_to_be_noted(error: OverBudgetError, now: datetime) -> bool:
    """Whether the budget that has no room does not say so yet."""
    return error.budget is not None and not error.budget.was_refused(now, budgets.NOTED_AGAIN_S)
