"""Which objects are wanted. An object is announced before it is put, and named by the transaction that needs it.

    announced ──put──▶ (object lies in the store) ──reference()──▶ referenced ──release()──▶ released ──sweeper──▶ gone
        └──expired, never named──▶ sweeper: row first, in a transaction, then the object

A writer that was too slow finds its row gone and gets `UploadGoneError`: it uploads again under a fresh key. So neither
the sweeper nor a paused writer can lose what a row names.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Connection, delete, insert, select, update

from storage import tables
from storage.errors import UploadGoneError

UPLOAD = "upload"
REFERENCED = "referenced"
RELEASED = "released"


def announce(tx: Connection, key: str, *, now: datetime, expires_at: datetime) -> None:
    """Say that an object will be put under `key`; committed before the put."""
    tx.execute(insert(tables.stored_object).values(key=key, state=UPLOAD, created_at=now, expires_at=expires_at))


def reference(tx: Connection, key: str, *, size_bytes: int) -> None:
    """Name an announced object, in the transaction of the row that needs it.

    Raises:
        UploadGoneError: the announcement expired; upload again under a new key.
    """
    row = tables.stored_object
    changed = tx.execute(
        update(row)
        .where(row.c.key == key, row.c.state == UPLOAD)
        .values(state=REFERENCED, size_bytes=size_bytes, expires_at=None)
    )
    if changed.rowcount != 1:
        raise UploadGoneError(key)


def release(tx: Connection, key: str) -> None:
    """No row needs the object any more; the sweeper may delete it."""
    tx.execute(update(tables.stored_object).where(tables.stored_object.c.key == key).values(state=RELEASED))


def keep(tx: Connection, key: str) -> None:
    """Something has come to need a named object: undo a release. Nothing happens if it was swept away already.

    The row is locked until the transaction ends: whoever wants to release the object waits, and then sees who needs it.
    """
    row = tables.stored_object
    tx.execute(update(row).where(row.c.key == key, row.c.state != UPLOAD).values(state=REFERENCED))


def lock(tx: Connection, key: str) -> None:
    """Wait for transactions that are about to need the object, before looking whether anything does."""
    row = tables.stored_object
    tx.execute(select(row.c.key).where(row.c.key == key).with_for_update())


def take_unwanted(tx: Connection, *, now: datetime, limit: int) -> Sequence[str]:
    """Forget released and expired objects and return their keys, to be deleted once this has been committed."""
    row = tables.stored_object
    expired = (row.c.state == UPLOAD) & (row.c.expires_at < now)
    keys = tx.execute(select(row.c.key).where(expired | (row.c.state == RELEASED)).limit(limit)).scalars().all()
    wanted_no_more = expired | (row.c.state == RELEASED)
    gone = tx.execute(delete(row).where(row.c.key.in_(keys), wanted_no_more).returning(row.c.key)).scalars().all()
    return list(gone)
