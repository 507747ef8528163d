"""From when to when the bytes of a checkpoint are kept: what storage is billed by.

What always holds: a checkpoint has one span, written by the transaction that writes its row; the span ends when the
checkpoint expires, or when its row is removed if that is sooner. A span that has ended never changes again.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, case, insert, literal, update

from storage import billing_tables

_table = billing_tables.storage_span


def begin(
    tx: Connection,
    checkpoint_id: int,
    *,
    account_id: str,
    run_id: str,
    size_bytes: int,
    now: datetime,
    until: datetime | None,
) -> None:
    """A checkpoint has come into being.

    Args:
        until: when it expires; None is never.
    """
    values = {"account_id": account_id, "run_id": run_id, "size_bytes": size_bytes, "since": now, "until": until}
    tx.execute(insert(_table).values(checkpoint_id=checkpoint_id, **values))


def end(tx: Connection, checkpoint_id: int, *, at: datetime) -> None:
    """The checkpoint's row was removed; if it had expired before, it was kept until then."""
    end = case((_table.c.since > at, _table.c.since), else_=literal(at, _table.c.until.type))  # clocks may be set back
    until = case((_table.c.until <= at, _table.c.until), else_=end)
    tx.execute(update(_table).where(_table.c.checkpoint_id == checkpoint_id).values(until=until, checkpoint_id=None))


def move_end(tx: Connection, checkpoint_id: int, *, until: datetime | None, now: datetime) -> None:
    """A checkpoint that is kept now will expire at another time; None is never. What is past stays as it was."""
    until = until if until is None else max(until, now)
    tx.execute(update(_table).where(_table.c.checkpoint_id == checkpoint_id).values(until=until))
