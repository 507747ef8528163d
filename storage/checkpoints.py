"""Checkpoints: weights the user named, and may load, sample from and download."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, delete, exists, func, insert, or_, select, update

from storage import storage_spans, tables, uploads
from storage.errors import RowNotFoundError
from storage.ids import CheckpointPath

_table = tables.checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """Named weights of a run.

    Attributes:
        kind: `weights`, `sampler_weights` or `external_weights`.
        object_key: weights in the engine's form (with optimizer state for `weights`).
        files: file name → {"key", "size"}: adapter files in PEFT's form, for downloads.
        size_bytes: of everything stored.
        expires_at: None never expires.
    """

    id: int
    account_id: str
    run_id: str
    kind: str
    name: str
    base_model: str
    lora: Mapping[str, Any]
    object_key: str
    files: Mapping[str, Mapping[str, Any]]
    size_bytes: int
    user_metadata: Mapping[str, str]
    public: bool
    created_at: datetime
    expires_at: datetime | None

    @property
    def path(self) -> CheckpointPath:
        """`tinker://…`."""
        return CheckpointPath(self.run_id, self.kind, self.name)


class CheckpointExistsError(ValueError):
    """The run has a checkpoint of this kind and name already."""


def publish(
    tx: Connection,
    *,
    account_id: str,
    path: CheckpointPath,
    base_model: str,
    lora: Mapping[str, Any],
    object_key: str,
    files: Mapping[str, Mapping[str, Any]],
    size_bytes: int,
    user_metadata: Mapping[str, str],
    now: datetime,
    expires_at: datetime | None,
    overwrite: bool,
) -> None:
    """Give stored weights a name; their uploads become references, and their span begins.

    Raises:
        CheckpointExistsError: the name is taken and `overwrite` is not set.
        UploadGoneError: the weights were swept away; store them again.
    """
    tx.execute(select(tables.run.c.id).where(tables.run.c.id == path.run).with_for_update())  # one at a time per run
    before = find(tx, path, now=now)
    if before is not None and not overwrite:
        raise CheckpointExistsError(f"{path} exists already; save under another name or with overwrite=True")
    _remove_row(tx, now, _at(path))
    stored: dict[str, Mapping[str, Any]] = {object_key: {"size": size_bytes}}
    stored |= {file["key"]: file for file in files.values()}
    for key, file in stored.items():
        uploads.reference(tx, key, size_bytes=file["size"], sha256=file.get("sha256"))
    added = tx.execute(
        insert(_table)
        .values(
            account_id=account_id,
            run_id=path.run,
            kind=path.kind,
            name=path.name,
            base_model=base_model,
            lora=dict(lora),
            object_key=object_key,
            files={name: dict(file) for name, file in files.items()},
            size_bytes=size_bytes,
            user_metadata=dict(user_metadata),
            created_at=now,
            expires_at=expires_at,
        )
        .returning(_table.c.id)
    )
    storage_spans.begin(
        tx,
        added.scalar_one(),
        account_id=account_id,
        run_id=path.run,
        size_bytes=size_bytes,
        now=now,
        until=expires_at,
    )


def find(tx: Connection, path: CheckpointPath, *, now: datetime) -> Checkpoint | None:
    """The unexpired checkpoint under this path."""
    row = tx.execute(_living(now).where(_at(path))).one_or_none()
    return None if row is None else Checkpoint(**row._mapping)


def get(tx: Connection, path: CheckpointPath, *, now: datetime, reader: str) -> Checkpoint:
    """A checkpoint that this account may read: its own, or a public one; it stays until the transaction ends.

    Raises:
        RowNotFoundError: there is none, it has expired, or it belongs to another account.
    """
    if tx.dialect.name != "sqlite":  # whoever deletes it waits, and then sees what has come to refer to its weights
        tx.execute(select(_table.c.id).where(_at(path)).with_for_update(read=True, key_share=True))
    checkpoint = find(tx, path, now=now)
    if checkpoint is None or (checkpoint.account_id != reader and not checkpoint.public):
        raise RowNotFoundError("checkpoint", str(path))
    return checkpoint


def list_of_run(tx: Connection, account_id: str, run_id: str, *, now: datetime) -> Sequence[Checkpoint]:
    """A run's checkpoints, newest first."""
    query = _living(now).where(_table.c.account_id == account_id, _table.c.run_id == run_id)
    return [Checkpoint(**row._mapping) for row in tx.execute(query.order_by(_table.c.id.desc()))]


def list_of_account(tx: Connection, account_id: str, *, now: datetime, limit: int, offset: int) -> Sequence[Checkpoint]:
    """An account's checkpoints, newest first."""
    query = _living(now).where(_table.c.account_id == account_id).order_by(_table.c.id.desc())
    return [Checkpoint(**row._mapping) for row in tx.execute(query.limit(limit).offset(offset))]


def count_of_account(tx: Connection, account_id: str, *, now: datetime) -> int:
    """How many checkpoints an account has."""
    living = or_(_table.c.expires_at.is_(None), _table.c.expires_at > now)
    return tx.execute(select(func.count()).where(_table.c.account_id == account_id, living)).scalar_one()


def set_public(tx: Connection, account_id: str, path: CheckpointPath, *, public: bool, now: datetime) -> None:
    """Let everybody read a checkpoint, or only its account; saying it again changes nothing.

    Raises:
        RowNotFoundError: the account has no such checkpoint.
    """
    _change(tx, account_id, path, now, public=public)


def set_expiry(
    tx: Connection, account_id: str, path: CheckpointPath, *, expires_at: datetime | None, now: datetime
) -> None:
    """Set or remove the time at which a checkpoint goes.

    Raises:
        RowNotFoundError: the account has no such checkpoint.
    """
    checkpoint = _change(tx, account_id, path, now, expires_at=expires_at)
    storage_spans.move_end(tx, checkpoint.id, until=expires_at, now=now)


def remove(tx: Connection, account_id: str, path: CheckpointPath, *, now: datetime) -> None:
    """Delete a checkpoint; what sampling sessions draw from stays until they go.

    Raises:
        RowNotFoundError: the account has no such checkpoint.
    """
    checkpoint = find(tx, path, now=now)
    if checkpoint is None or checkpoint.account_id != account_id:
        raise RowNotFoundError("checkpoint", str(path))
    _remove_row(tx, now, _at(path))


def remove_expired(tx: Connection, *, now: datetime, limit: int) -> int:
    """Delete checkpoints whose time has come; returns how many."""
    ids = tx.execute(select(_table.c.id).where(_table.c.expires_at <= now).limit(limit)).scalars().all()
    return sum(_remove_row(tx, now, _table.c.id == id_, _table.c.expires_at <= now) for id_ in ids)


def _change(tx: Connection, account_id: str, path: CheckpointPath, now: datetime, **values: object) -> Checkpoint:
    checkpoint = find(tx, path, now=now)
    if checkpoint is None or checkpoint.account_id != account_id:
        raise RowNotFoundError("checkpoint", str(path))
    tx.execute(update(_table).where(_at(path)).values(**values))
    return checkpoint


def _remove_row(tx: Connection, now: datetime, *which: ColumnElement[bool]) -> bool:
    """Remove the one checkpoint there is of this description; whether it was there still."""
    gone = delete(_table).where(*which).returning(_table.c.id, _table.c.object_key, _table.c.files)
    row = tx.execute(gone).one_or_none()
    if row is None:
        return False
    storage_spans.end(tx, row.id, at=now)
    release_unneeded(tx, [row.object_key, *(file["key"] for file in row.files.values())])
    return True


def release_unneeded(tx: Connection, keys: Iterable[str]) -> None:
    """Release those of these weights that no checkpoint, sampling session or operation refers to any more."""
    for key in sorted(set(keys)):
        uploads.lock(tx, key)
        if not _still_needed(tx, key):
            uploads.release(tx, key)


def _still_needed(tx: Connection, key: str) -> bool:
    """Whether another checkpoint, a sampling session or a run's queue still refers to the weights."""
    other = exists().where(_table.c.object_key == key)
    sampling = tables.sampling_session.c
    sampled = exists().where(sampling.object_key == key, sampling.ended_at.is_(None))
    loaded = exists().where(tables.operation.c.loads_key == key, tables.operation.c.expired.is_(False))
    return bool(tx.execute(select(or_(other, sampled, loaded))).scalar_one())


def _at(path: CheckpointPath) -> Any:
    return (_table.c.run_id == path.run) & (_table.c.kind == path.kind) & (_table.c.name == path.name)


def _living(now: datetime) -> Select[Any]:
    return select(_table).where(or_(_table.c.expires_at.is_(None), _table.c.expires_at > now))
