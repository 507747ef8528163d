"""State of a run at a `seq`, written by workers for recovery. The two newest are kept: one may turn out damaged."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, delete, insert, select

from storage import leases, tables, uploads
from storage.errors import LeaseLostError
from storage.leases import Lease

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
    tx: Connection, lease: Lease, *, seq: int, object_key: str, data_sha256: str, size_bytes: int, now: datetime
) -> None:
    """Name a stored snapshot, unless the lease was lost, and let the ones no longer needed go.

    One of the same `seq` is replaced: its bytes may be damaged, those of the new object were made just now. Naming the
    same object again, after a commit whose answer was lost, changes nothing.

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
    if known is not None:
        _remove(tx, known)
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


def verify(snapshot: Snapshot, data: bytes) -> None:
    """Compare bytes with the checksum.

    Raises:
        DamagedSnapshotError: they differ.
    """
    if checksum(data) != snapshot.sha256:
        raise DamagedSnapshotError(
            f"snapshot {snapshot.object_key} of run {snapshot.run_id} does not match its checksum"
        )


def checksum(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()
