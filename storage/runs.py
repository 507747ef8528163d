"""Sessions, training runs and sampling sessions: who made them and on what they stand."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, exists, func, or_, select, update

from storage import ids, rows, tables
from storage.errors import RowNotFoundError

ASKED_AGAIN_S = 600.0
"""A client that was answered 402 asks again every few seconds, unless it cannot reach the service for a while."""
BATCH_TAG = "batch:"


@dataclass(frozen=True)
class Session:
    """One connection of an SDK, kept by heartbeats.

    Attributes:
        batch: what its tag `batch:NAME` names; sessions with the same one are charged together.
    """

    id: str
    account_id: str
    project_id: str | None
    api_key_id: int | None
    tags: Sequence[str]
    user_metadata: Mapping[str, str]
    display_name: str | None
    sdk_version: str
    created_at: datetime
    heartbeat_at: datetime
    finished_at: datetime | None
    finish_reason: str | None
    finish_detail: str | None
    batch: str | None


@dataclass(frozen=True)
class Run:
    """A LoRA being trained.

    Attributes:
        lora: the fields of `LoraConfig`.
        state_seq: last operation whose effect is committed; -1 before the first.
        num_failures: failures recorded so far.
        lease_worker, lease_epoch, lease_expires_at: who may advance it, and until when.
        replayed_by: the worker that computes its tail again.
        replays_alone, replay_blame: what deaths during replays have left behind (`replays.py`).
        budget_refused_seq, budget_refused_at: the operation that was last answered 402, and when.
    """

    id: str
    account_id: str
    session_id: str
    model_seq_id: int
    base_model: str
    lora: Mapping[str, Any]
    optimizer: str
    user_metadata: Mapping[str, str]
    created_at: datetime
    last_request_at: datetime
    state_seq: int
    num_failures: int
    lease_worker: str | None
    lease_epoch: int
    lease_expires_at: datetime | None
    replayed_by: str | None
    replays_alone: bool
    replay_blame: int
    budget_refused_seq: int | None
    budget_refused_at: datetime | None


@dataclass(frozen=True)
class SamplingSession:
    """What samples are drawn from: a base model, and adapter weights unless `object_key` is None.

    Attributes:
        run_id: the account's own run that the weights are from; its cost includes the samples.
        ended_at: when its weights were let go, because its client had long been gone.
    """

    id: str
    account_id: str
    session_id: str
    sampling_session_seq_id: int
    run_id: str | None
    base_model: str
    model_path: str | None
    object_key: str | None
    lora: Mapping[str, Any] | None
    created_at: datetime
    ended_at: datetime | None


# ----------------------------------------------------------------------------------------------------------- sessions


def create_session(
    tx: Connection,
    *,
    account_id: str,
    api_key_id: int | None,
    now: datetime,
    sdk_version: str,
    project_id: str | None = None,
    tags: Sequence[str] = (),
    user_metadata: Mapping[str, str] | None = None,
    display_name: str | None = None,
    idempotency_key: str | None = None,
) -> Session:
    """Open a session; the same idempotency key of an account gives the session it gave before."""
    table = tables.session
    session_id = ids.new_session_id()
    new = rows.insert_if_absent(
        tx,
        table,
        id=session_id,
        account_id=account_id,
        project_id=project_id,
        api_key_id=api_key_id,
        idempotency_key=idempotency_key,
        tags=list(tags),
        user_metadata=dict(user_metadata or {}),
        display_name=display_name,
        batch=next((tag.removeprefix(BATCH_TAG) for tag in tags if tag.startswith(BATCH_TAG)), None),
        sdk_version=sdk_version,
        created_at=now,
        heartbeat_at=now,
    )
    if new:
        return get_session(tx, account_id, session_id)
    same = (table.c.account_id == account_id) & (table.c.idempotency_key == idempotency_key)
    return Session(**tx.execute(_sessions().where(same)).one()._mapping)


def get_session(tx: Connection, account_id: str, session_id: str) -> Session:
    """A session of this account.

    Raises:
        RowNotFoundError: there is none.
    """
    table = tables.session.c
    row = tx.execute(_sessions().where(table.id == session_id, table.account_id == account_id)).one_or_none()
    if row is None:
        raise RowNotFoundError("session", session_id)
    return Session(**row._mapping)


def is_any_session(tx: Connection, **wanted: str) -> bool:
    """Whether there is a session, of any account, with these values in its columns."""
    table = tables.session.c
    query = select(table.id).where(*(table[name] == value for name, value in wanted.items())).limit(1)
    return tx.execute(query).one_or_none() is not None


def list_sessions(tx: Connection, account_id: str, *, limit: int, offset: int = 0) -> Sequence[Session]:
    """An account's sessions, newest first."""
    table = tables.session.c
    newest = _sessions().where(table.account_id == account_id).order_by(table.created_at.desc(), table.id.desc())
    return [Session(**row._mapping) for row in tx.execute(newest.limit(limit).offset(offset))]


def record_heartbeat(tx: Connection, account_id: str, session_id: str, *, now: datetime) -> bool:
    """Note that the client is there.

    Returns:
        False when the session has been finished.

    Raises:
        RowNotFoundError: there is no such session.
    """
    if get_session(tx, account_id, session_id).finished_at is not None:
        return False
    tx.execute(update(tables.session).where(tables.session.c.id == session_id).values(heartbeat_at=now))
    return True


def finish_session(
    tx: Connection, account_id: str, session_id: str, *, reason: str, detail: str | None, now: datetime
) -> None:
    """End a session; the first reason stands.

    Raises:
        RowNotFoundError: there is no such session.
    """
    get_session(tx, account_id, session_id)
    table = tables.session
    tx.execute(
        update(table)
        .where(table.c.id == session_id, table.c.finished_at.is_(None))
        .values(finished_at=now, finish_reason=reason, finish_detail=detail)
    )


# --------------------------------------------------------------------------------------------------------------- runs


def find_run_of_session(tx: Connection, session_id: str, model_seq_id: int) -> Run | None:
    """The run that this `create_model` (or create-by-load) made before."""
    table = tables.run.c
    query = _runs().where(table.session_id == session_id, table.model_seq_id == model_seq_id)
    row = tx.execute(query).one_or_none()
    return None if row is None else Run(**row._mapping)


def create_run(
    tx: Connection,
    *,
    account_id: str,
    session_id: str,
    model_seq_id: int,
    base_model: str,
    lora: Mapping[str, Any],
    optimizer: str,
    user_metadata: Mapping[str, str] | None,
    now: datetime,
) -> Run:
    """Add a run, or return the one that the same `model_seq_id` made before; operation 0 is accepted beside it."""
    run_id = ids.run_id(session_id, model_seq_id)
    rows.insert_if_absent(
        tx,
        tables.run,
        id=run_id,
        account_id=account_id,
        session_id=session_id,
        model_seq_id=model_seq_id,
        base_model=base_model,
        lora=dict(lora),
        optimizer=optimizer,
        user_metadata=dict(user_metadata or {}),
        created_at=now,
        last_request_at=now,
    )
    return get_run(tx, run_id, account_id=account_id)


def get_run(tx: Connection, run_id: str, *, account_id: str | None = None) -> Run:
    """A run, of this account if one is named.

    Raises:
        RowNotFoundError: there is none.
    """
    query = _runs().where(tables.run.c.id == run_id)
    if account_id is not None:
        query = query.where(tables.run.c.account_id == account_id)
    row = tx.execute(query).one_or_none()
    if row is None:
        raise RowNotFoundError("training run", run_id)
    return Run(**row._mapping)


def note_refused(tx: Connection, run_id: str, seq: int, *, now: datetime) -> None:
    """A `seq` has no room under a cap: its place is no gap as long as its client asks again.

    The first one is noted. While it is asked for, later ones change nothing: should its client give it up, they go on.
    """
    table = tables.run
    if refused_before(tx, run_id, seq, now=now) is None:
        values = {"budget_refused_seq": seq, "budget_refused_at": now}
        tx.execute(update(table).where(table.c.id == run_id).values(**values))


def refused_before(tx: Connection, run_id: str, seq: int, *, now: datetime) -> int | None:
    """An earlier `seq` of the run for which a cap had no room lately, and which is not there yet."""
    refused_seq = tables.run.c.budget_refused_seq
    query = select(refused_seq).where(tables.run.c.id == run_id, refused_seq < seq, *_refused_lately(now))
    found: int | None = tx.execute(query).scalar_one_or_none()
    return found


def refused_lately(tx: Connection, run_ids: Collection[str], *, now: datetime) -> Collection[str]:
    """Those of these runs of which a cap had no room lately for something that is not there yet."""
    query = select(tables.run.c.id).where(tables.run.c.id.in_(run_ids), *_refused_lately(now))
    return tx.execute(query).scalars().all()


def _refused_lately(now: datetime) -> Sequence[ColumnElement[bool]]:
    run, operation = tables.run.c, tables.operation.c
    there = select(operation.id).where(operation.run_id == run.id, operation.seq == run.budget_refused_seq).exists()
    return run.budget_refused_at > now - timedelta(seconds=ASKED_AGAIN_S), ~there


def list_runs(
    tx: Connection, account_id: str, *, limit: int, offset: int = 0, session_id: str | None = None
) -> Sequence[Run]:
    """An account's runs, newest first."""
    table = tables.run.c
    query = _runs().where(table.account_id == account_id).order_by(table.created_at.desc(), table.id.desc())
    if session_id is not None:
        query = query.where(table.session_id == session_id)
    return [Run(**row._mapping) for row in tx.execute(query.limit(limit).offset(offset))]


def without_client(tx: Connection, run_ids: Iterable[str], *, silent_since: datetime) -> set[str]:
    """Those of these runs whose client has finished its session, or was last heard of before `silent_since`."""
    run, session = tables.run, tables.session
    silent = and_(session.c.heartbeat_at < silent_since, run.c.last_request_at < silent_since)
    query = (
        select(run.c.id)
        .join(session, session.c.id == run.c.session_id)
        .where(run.c.id.in_(list(run_ids)), or_(session.c.finished_at.is_not(None), silent))
    )
    return set(tx.execute(query).scalars())


def count_runs(tx: Connection, account_id: str) -> int:
    """How many runs an account has."""
    return tx.execute(select(func.count()).where(tables.run.c.account_id == account_id)).scalar_one()


# -------------------------------------------------------------------------------------------------- sampling sessions


def create_sampling_session(
    tx: Connection,
    *,
    account_id: str,
    session_id: str,
    sampling_session_seq_id: int,
    base_model: str,
    now: datetime,
    run_id: str | None = None,
    model_path: str | None = None,
    object_key: str | None = None,
    lora: Mapping[str, Any] | None = None,
) -> SamplingSession:
    """Add a sampling session, or return the one that the same `sampling_session_seq_id` made before."""
    sampling_id = ids.sampling_session_id(session_id, sampling_session_seq_id)
    rows.insert_if_absent(
        tx,
        tables.sampling_session,
        id=sampling_id,
        account_id=account_id,
        session_id=session_id,
        sampling_session_seq_id=sampling_session_seq_id,
        run_id=run_id,
        base_model=base_model,
        model_path=model_path,
        object_key=object_key,
        lora=None if lora is None else dict(lora),
        created_at=now,
    )
    return get_sampling_session(tx, sampling_id, account_id=account_id)


def get_sampling_session(tx: Connection, sampling_id: str, *, account_id: str | None = None) -> SamplingSession:
    """A sampling session, of this account if one is named.

    Raises:
        RowNotFoundError: there is none.
    """
    query = _sampling_sessions().where(tables.sampling_session.c.id == sampling_id)
    if account_id is not None:
        query = query.where(tables.sampling_session.c.account_id == account_id)
    row = tx.execute(query).one_or_none()
    if row is None:
        raise RowNotFoundError("sampling session", sampling_id)
    return SamplingSession(**row._mapping)


def list_sampling_sessions(tx: Connection, account_id: str, session_id: str) -> Sequence[SamplingSession]:
    """The sampling sessions of a session, oldest first."""
    table = tables.sampling_session.c
    query = _sampling_sessions().where(table.account_id == account_id, table.session_id == session_id)
    return [SamplingSession(**row._mapping) for row in tx.execute(query.order_by(table.created_at))]


def join_sampling_session(tx: Connection, sampling_id: str) -> int:
    """A number for one more copy of a sampling client, from 1 on; the original is 0."""
    table = tables.sampling_session
    clones = update(table).where(table.c.id == sampling_id).values(num_clones=table.c.num_clones + 1)
    number: int = tx.execute(clones.returning(table.c.num_clones)).scalar_one()
    return number


def end_abandoned_sampling_sessions(
    tx: Connection, *, silent_since: datetime, now: datetime, limit: int
) -> Sequence[str]:
    """End the sampling sessions of clients that finished, or were last heard of, before `silent_since`.

    Returns:
        Object keys of the weights they drew from.
    """
    sampling, session, operation = tables.sampling_session, tables.session, tables.operation
    waiting = exists().where(
        operation.c.sampling_session_id == sampling.c.id, operation.c.status.in_(("queued", "running"))
    )
    rows = tx.execute(
        select(sampling.c.id, sampling.c.object_key)
        .join(session, session.c.id == sampling.c.session_id)
        .where(sampling.c.ended_at.is_(None), sampling.c.object_key.is_not(None))
        .where(or_(session.c.finished_at < silent_since, session.c.heartbeat_at < silent_since))
        .where(sampling.c.created_at < silent_since, ~waiting)
        .limit(limit)
    ).all()
    tx.execute(update(sampling).where(sampling.c.id.in_([row.id for row in rows])).values(ended_at=now))
    return [row.object_key for row in rows]


def _sessions() -> Select[Any]:
    return select(*(column for column in tables.session.c if column.name != "idempotency_key"))


def _runs() -> Select[Any]:
    return select(tables.run)


def _sampling_sessions() -> Select[Any]:
    return select(*(column for column in tables.sampling_session.c if column.name != "num_clones"))
