"""Who may advance a run: a lease with an epoch, in the run's row.

Safety rests on the epoch alone: `advance` is part of every commit and fails once another worker has acquired the run.
Expiry, judged by the database's clock, only decides when another may try.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, or_, select, update

from storage import journal, replays, tables
from storage.errors import LeaseLostError
from storage.suspects import Cause

_run = tables.run


@dataclass(frozen=True)
class Lease:
    """The right to advance a run, as long as no later epoch exists."""

    run_id: str
    worker_id: str
    epoch: int


def acquire(tx: Connection, run_id: str, *, worker_id: str, now: datetime, expires_at: datetime) -> Lease:
    """Take a run's lease if it is free, expired or this worker's already; the epoch grows by one.

    What another worker has begun and left becomes suspect, operations and replay: it has let its lease expire, nobody
    knows why.

    Raises:
        LeaseLostError: another worker holds it; says who.
    """
    free = or_(_run.c.lease_worker.is_(None), _run.c.lease_worker == worker_id, _run.c.lease_expires_at < now)
    taken = tx.execute(
        update(_run)
        .where(_run.c.id == run_id, free)
        .values(lease_worker=worker_id, lease_epoch=_run.c.lease_epoch + 1, lease_expires_at=expires_at)
        .returning(_run.c.lease_epoch)
    ).scalar_one_or_none()
    if taken is None:
        holder = tx.execute(select(_run.c.lease_worker, _run.c.lease_epoch).where(_run.c.id == run_id)).one()
        raise LeaseLostError(run_id, holder.lease_epoch, holder.lease_worker)
    replays.note_end(tx, [run_id], Cause.UNKNOWN, but_of=worker_id)
    journal.put_back(tx, run_id=run_id, but_of=worker_id, cause=Cause.UNKNOWN)
    journal.put_back(tx, run_id=run_id, cause=Cause.STOPPED)
    return Lease(run_id, worker_id, taken)


def advance(tx: Connection, lease: Lease, *, state_seq: int) -> None:
    """Move a run's committed state on, in the transaction that records what happened.

    Raises:
        LeaseLostError: a later epoch exists; roll the run's part of the transaction back.
    """
    held = update(_run).where(
        _run.c.id == lease.run_id, _run.c.lease_epoch == lease.epoch, _run.c.lease_worker == lease.worker_id
    )
    if tx.execute(held.values(state_seq=state_seq)).rowcount != 1:
        holder = tx.execute(select(_run.c.lease_worker).where(_run.c.id == lease.run_id)).scalar_one_or_none()
        raise LeaseLostError(lease.run_id, lease.epoch, holder)


def committed_seq(tx: Connection, lease: Lease) -> int:
    """The run's state version, its row locked until the transaction ends.

    Raises:
        LeaseLostError: a later epoch exists.
    """
    query = select(_run.c.state_seq, _run.c.lease_epoch, _run.c.lease_worker).where(_run.c.id == lease.run_id)
    if tx.dialect.name != "sqlite":
        query = query.with_for_update()
    row = tx.execute(query).one()
    if (row.lease_epoch, row.lease_worker) != (lease.epoch, lease.worker_id):
        raise LeaseLostError(lease.run_id, lease.epoch, row.lease_worker)
    state_seq: int = row.state_seq
    return state_seq


def is_held(tx: Connection, lease: Lease) -> bool:
    """Whether no later epoch exists; locks the row until the transaction ends."""
    query = select(_run.c.id).where(
        _run.c.id == lease.run_id, _run.c.lease_epoch == lease.epoch, _run.c.lease_worker == lease.worker_id
    )
    if tx.dialect.name != "sqlite":
        query = query.with_for_update()
    return tx.execute(query).one_or_none() is not None


def renew(tx: Connection, held: Sequence[Lease], *, expires_at: datetime) -> Sequence[str]:
    """Extend leases; returns the runs whose lease is still this worker's."""
    kept: list[str] = []
    for lease in sorted(held, key=lambda lease: lease.run_id):  # rows are always locked in this order: no deadlocks
        mine = update(_run).where(
            _run.c.id == lease.run_id, _run.c.lease_epoch == lease.epoch, _run.c.lease_worker == lease.worker_id
        )
        if tx.execute(mine.values(lease_expires_at=expires_at)).rowcount == 1:
            kept.append(lease.run_id)
    return kept


def release(tx: Connection, lease: Lease) -> None:
    """Give a lease up, and what was begun under it back; nothing happens if it was lost already."""
    given_up = tx.execute(
        update(_run)
        .where(_run.c.id == lease.run_id, _run.c.lease_epoch == lease.epoch, _run.c.lease_worker == lease.worker_id)
        .values(lease_worker=None, lease_expires_at=None, replayed_by=None)
    )
    if given_up.rowcount == 1:
        journal.put_back(tx, run_id=lease.run_id, worker_id=lease.worker_id, cause=Cause.STOPPED)


def release_worker(tx: Connection, worker_id: str) -> Sequence[str]:
    """Free everything a worker held that is known to be dead; returns its runs.

    The epoch is raised too, so that a worker wrongly thought dead cannot commit any more.
    """
    held = select(_run.c.id).where(_run.c.lease_worker == worker_id).order_by(_run.c.id)  # as `renew` locks them
    if tx.dialect.name != "sqlite":
        held = held.with_for_update()
    freed = (
        update(_run)
        .where(_run.c.id.in_(tx.execute(held).scalars().all()))
        .values(lease_worker=None, lease_expires_at=None, lease_epoch=_run.c.lease_epoch + 1)
    )
    return list(tx.execute(freed.returning(_run.c.id)).scalars().all())


def find_holder(tx: Connection, run_id: str, *, now: datetime) -> str | None:
    """The worker whose lease on this run has not expired."""
    query = select(_run.c.lease_worker).where(_run.c.id == run_id, _run.c.lease_expires_at >= now)
    return tx.execute(query).scalar_one_or_none()
