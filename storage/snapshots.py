"""State of a run at a `seq`, written by workers for recovery. The two newest are kept: one may turn out damaged."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, delete, insert, select

from storage import leases, tables, uploads
from storage.checksums import RunningChecksum
from storage.errors import LeaseLostError
from storage.leases import Lease
from storage.objects import ObjectStore

KEPT = 2


@dataclass(frozen=True)
class Snapshot:
    """Where a state lies, and what its bytes must hash to."""

    run_id: str
    seq: int
    object_key: str
    size_bytes: int
    sha256: str
    created_at: datetime


class DamagedSnapshotError(Exception):
    """A snapshot's bytes are not those that were written; use the one before it."""


def add(
    tx: Connection,
    lease: Lease,
    *,
    seq: int,
    object_key: str,
    data_sha256: str,
    size_bytes: int,
    now: datetime,
    damaged: Collection[int] = (),
) -> None:
    """Name a stored snapshot, unless the lease was lost, and let the ones no longer needed go.

    One of the same `seq` is replaced: its bytes may be damaged, those of the new object were made just now. Naming the
    same object again, after a commit whose answer was lost, changes nothing.

    Args:
        damaged: snapshots (`seq`s) that were found damaged. They go first: as long as one of them counted as the second
            newest, what a replay from the one before it needs would not be kept.

    Raises:
        LeaseLostError: a later epoch exists.
        UploadGoneError: the object was swept away; write it again.
    """
    if not leases.is_held(tx, lease):
        raise LeaseLostError(lease.run_id, lease.epoch)
    known = next((known for known in newest_first(tx, lease.run_id) if known.seq == seq), None)
    if known is not None and known.object_key == object_key:
        return
    uploads.reference(tx, object_key, size_bytes=size_bytes)
    for unusable in newest_first(tx, lease.run_id):
        if unusable.seq == seq or unusable.seq in damaged:
            _remove(tx, unusable)
    tx.execute(
        insert(tables.snapshot).values(
            run_id=lease.run_id,
            seq=seq,
            object_key=object_key,
            size_bytes=size_bytes,
            sha256=data_sha256,
            created_at=now,
        )
    )
    for old in newest_first(tx, lease.run_id)[KEPT:]:
        _remove(tx, old)


def _remove(tx: Connection, old: Snapshot) -> None:
    table = tables.snapshot
    tx.execute(delete(table).where(table.c.run_id == old.run_id, table.c.seq == old.seq))
    uploads.release(tx, old.object_key)


def newest_first(tx: Connection, run_id: str) -> Sequence[Snapshot]:
    """A run's snapshots."""
    table = tables.snapshot
    rows = tx.execute(select(table).where(table.c.run_id == run_id).order_by(table.c.seq.desc()))
    return [Snapshot(**row._mapping) for row in rows]


def newest_seq(tx: Connection, run_id: str) -> int | None:
    """The `seq` of the newest snapshot."""
    snapshots = newest_first(tx, run_id)
    return snapshots[0].seq if snapshots else None


def read(objects: ObjectStore, snapshot: Snapshot) -> Generator[bytes, None, None]:
    """A snapshot's bytes in chunks. Nothing of them may be believed before the generator has ended without an error.

    Raises:
        ObjectNotFoundError: it is gone; raised with the first chunk.
        DamagedSnapshotError: the bytes are not those that were written; raised after the last chunk.
    """
    with RunningChecksum() as running:
        for chunk in objects.stream(snapshot.object_key):
            running.update(chunk)
            yield chunk
        if running.hexdigest() != snapshot.sha256:
            raise DamagedSnapshotError(
                f"snapshot {snapshot.object_key} of run {snapshot.run_id} does not match its checksum"
            )
