"""Which objects are wanted. An object is announced before it is put, and named by the transaction that needs it.

    announced ──put──▶ (object lies in the store) ──reference()──▶ referenced ──release()──▶ released
        └──expired, never named──────────────────▶ deleting ◀──────────sweeper──────────────────┘
                                                      └──the object is deleted──▶ (no row)
                                                             └──never named──▶ late ──as long again──▶ deleting

A writer that was too slow finds its row `deleting`, or gone, and gets `UploadGoneError`: it uploads again under a fresh
key. So neither the sweeper nor a paused writer can lose what a row names; and an object whose deletion failed, or that
was put only after it, is still known by its row, so that a later pass deletes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Connection, and_, delete, insert, or_, select, update

from storage import tables
from storage.errors import UploadGoneError

UPLOAD = "upload"
REFERENCED = "referenced"
RELEASED = "released"
DELETING = "deleting"
"""Nothing names the object any more, nor ever will again."""
LATE = "late"
"""Deleted, but its writer was never heard of, and may put it still."""


def announce(tx: Connection, key: str, *, now: datetime, expires_at: datetime) -> None:
    """Say that an object will be put under `key`; committed before the put."""
    tx.execute(insert(tables.stored_object).values(key=key, state=UPLOAD, created_at=now, expires_at=expires_at))


def reference(tx: Connection, key: str, *, size_bytes: int, sha256: str | None = None) -> None:
    """Name an announced object, in the transaction of the row that needs it.

    Args:
        sha256: checksum that whoever reads the object is to find; None is not verified here.

    Raises:
        UploadGoneError: the announcement expired; upload again under a new key.
    """
    row = tables.stored_object
    changed = tx.execute(
        update(row)
        .where(row.c.key == key, row.c.state == UPLOAD)
        .values(state=REFERENCED, size_bytes=size_bytes, sha256=sha256, expires_at=None)
    )
    if changed.rowcount != 1:
        raise UploadGoneError(key)


def find_checksum(tx: Connection, key: str) -> str | None:
    """The checksum that an object was named with; None if it has none, or nothing names it."""
    row = tables.stored_object.c
    found: str | None = tx.execute(select(row.sha256).where(row.key == key)).scalar_one_or_none()
    return found


def is_awaited(tx: Connection, key: str) -> bool:
    """Whether an announced object may still be named."""
    row = tables.stored_object
    return tx.execute(select(row.c.key).where(row.c.key == key, row.c.state == UPLOAD)).one_or_none() is not None


def release(tx: Connection, *keys: str) -> None:
    """No row needs these objects any more; the sweeper may delete them."""
    row = tables.stored_object
    tx.execute(update(row).where(row.c.key.in_(keys), row.c.state != DELETING).values(state=RELEASED))


def keep(tx: Connection, key: str) -> None:
    """Something has come to need a named object: undo a release. Nothing happens if it is being swept away already.

    The row is locked until the transaction ends: whoever wants to release the object waits, and then sees who needs it.
    """
    row = tables.stored_object
    tx.execute(update(row).where(row.c.key == key, row.c.state.in_((REFERENCED, RELEASED))).values(state=REFERENCED))


def lock(tx: Connection, key: str) -> None:
    """Wait for transactions that are about to need the object, before looking whether anything does."""
    row = tables.stored_object
    tx.execute(select(row.c.key).where(row.c.key == key).with_for_update())


def take_unwanted(tx: Connection, *, now: datetime, limit: int) -> Sequence[str]:
    """Doom released and expired objects; returns their keys and those of earlier calls that were not forgotten yet.

    They are to be deleted once this has been committed, and then forgotten.
    """
    row = tables.stored_object
    expired = and_(row.c.state.in_((UPLOAD, LATE)), row.c.expires_at < now)
    query = select(row.c.key).where(or_(row.c.state.in_((RELEASED, DELETING)), expired))
    keys = tx.execute(query.limit(limit).with_for_update(skip_locked=True)).scalars().all()
    put_for_sure = update(row).where(row.c.key.in_(keys), row.c.state.in_((RELEASED, LATE)))
    tx.execute(put_for_sure.values(state=DELETING, expires_at=None))
    tx.execute(update(row).where(row.c.key.in_(keys), row.c.state == UPLOAD).values(state=DELETING))
    return keys


def forget(tx: Connection, keys: Sequence[str], *, now: datetime) -> None:
    """Remove the rows of objects that have been deleted.

    The writer of one that was announced and never named may put it still: that row stays for as long again, and then
    the object is deleted once more.
    """
    row = tables.stored_object
    query = select(row.c.key, row.c.created_at, row.c.expires_at).where(row.c.key.in_(keys), row.c.state == DELETING)
    deleted = tx.execute(query.with_for_update(skip_locked=True)).all()
    tx.execute(delete(row).where(row.c.key.in_([one.key for one in deleted if one.expires_at is None])))
    for one in deleted:
        if one.expires_at is not None:
            until = now + (one.expires_at - one.created_at)
            tx.execute(update(row).where(row.c.key == one.key).values(state=LATE, expires_at=until))
