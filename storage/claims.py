"""Claims on samples: they have no order, so a worker claims some, and only the claim that stands may complete one.

A claim is a row of the journal that runs: it has a holder, an end, and the number of its attempt. Whoever changes
several in a transaction locks them in order of their ids, so that no two wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, FromClause, Select, and_, func, select, text, true, tuple_, update

from storage import journal, suspects, tables
from storage.errors import ClaimLostError
from storage.journal import Operation, Status
from storage.suspects import Cause


def claim_samples(
    tx: Connection,
    *,
    worker_id: str,
    limit: int,
    now: datetime,
    expires_at: datetime,
    skip_locked: bool,
    among: ColumnElement[bool] | None = None,
) -> Sequence[Operation]:
    """Take queued samples that are no suspects; each claim is one attempt more, and its write-down.

    Every account that waits gets an equal share of `limit`, oldest first, those with the fewest samples running before
    others; what is left is filled up with the oldest. So nobody waits behind another account's queue.

    Args:
        among: a condition on operations; others are left where they are.
    """
    table = tables.operation
    innocent = and_(table.c.suspect.is_(False), _any(among))

    def take(query: Select[Any], number: int) -> Sequence[int]:
        return tx.execute(_locked(query.where(innocent).limit(number), skip_locked)).scalars().all()

    waiting = _accounts_with_samples(tx, among)
    claimed: list[int] = []
    for account_id in waiting[:limit] if len(waiting) > 1 else ():
        claimed.extend(take(_queued_of(account_id), max(1, limit // len(waiting))))
    if waiting and len(claimed) < limit:
        claimed.extend(take(_queued().where(table.c.id.not_in(claimed)), limit - len(claimed)))
    return _claim(tx, claimed, worker_id=worker_id, now=now, expires_at=expires_at, alone=False)


def claim_suspect(
    tx: Connection,
    *,
    worker_id: str,
    now: datetime,
    expires_at: datetime,
    skip_locked: bool,
    among: ColumnElement[bool] | None = None,
) -> Operation | None:
    """Take the oldest queued sample that is a suspect, for a worker that holds no other: it is to be drawn alone."""
    found = tx.execute(_locked(_queued_suspects().where(_any(among)).limit(1), skip_locked)).scalars().all()
    claimed = _claim(tx, found, worker_id=worker_id, now=now, expires_at=expires_at, alone=True)
    return claimed[0] if claimed else None


def _locked(query: Select[Any], skip_locked: bool) -> Select[Any]:
    return query.with_for_update(skip_locked=True) if skip_locked else query


def _claim(
    tx: Connection, operation_ids: Sequence[int], *, worker_id: str, now: datetime, expires_at: datetime, alone: bool
) -> Sequence[Operation]:
    if not operation_ids:
        return []
    table = tables.operation
    tx.execute(
        update(table)
        .where(table.c.id.in_(operation_ids))
        .values(
            status=Status.RUNNING,
            attempts=table.c.attempts + 1,
            worker_id=worker_id,
            started_at=now,
            claim_expires_at=expires_at,
            alone=alone,
        )
    )
    return journal.operations_of(tx, operation_ids)


def _accounts_with_samples(tx: Connection, among: ColumnElement[bool] | None) -> Sequence[str]:
    """Accounts with samples to be taken: those with the fewest running first, then those that have waited longest."""
    table, later = tables.operation, tables.operation.alias("later")
    first = _open_samples(table, Status.QUEUED, func.min(table.c.account_id).label("id"))
    account = first.cte("account", recursive=True)  # steps from account to account in the index, however long a queue
    following = _open_samples(later, Status.QUEUED, func.min(later.c.account_id)).where(
        later.c.account_id > account.c.id
    )
    account = account.union_all(select(following.scalar_subquery()).where(account.c.id.is_not(None)))
    oldest = _queued_of(account.c.id).where(_any(among)).limit(1).correlate(account).scalar_subquery()
    found = tx.execute(select(account.c.id, oldest).where(account.c.id.is_not(None)))
    waiting = [row for row in found if row[1] is not None]
    if len(waiting) < 2:
        return [account_id for account_id, _ in waiting]
    running = _open_samples(table, Status.RUNNING, table.c.account_id, func.count()).group_by(table.c.account_id)
    num_running = {row[0]: row[1] for row in tx.execute(running)}
    return [id_ for id_, _ in sorted(waiting, key=lambda row: (num_running.get(row[0], 0), row[1]))]


def _queued() -> Select[Any]:
    """Ids of all queued samples, oldest first; a range of one status, for the reason that `_queued_of` gives."""
    table = tables.operation.c
    status = (table.status >= Status.QUEUED, table.status <= Status.QUEUED)
    open_samples = (table.sampling_session_id.is_not(None), table.finished_at.is_(None))
    return select(table.id).where(*status, *open_samples).order_by(table.status, table.id)


def _queued_suspects() -> Select[Any]:
    """Ids of queued samples that are suspects, oldest first, in the words of their partial index."""
    table = tables.operation.c
    open_suspects = (text("operation.suspect"), table.sampling_session_id.is_not(None), table.finished_at.is_(None))
    return select(table.id).where(table.status == Status.QUEUED, *open_suspects).order_by(table.id)


def _queued_of(account_id: str | ColumnElement[str]) -> Select[Any]:
    """Ids of an account's queued samples, oldest first.

    A range of one account, since in order of (account, id) only one index serves; asked for an equal account in order
    of id, a database may walk all queued samples in hope of soon meeting one.
    """
    table = tables.operation
    query = _open_samples(table, Status.QUEUED, table.c.id)
    query = query.where(table.c.account_id >= account_id, table.c.account_id <= account_id)
    return query.order_by(table.c.account_id, table.c.id)


def _open_samples(table: FromClause, status: Status, *columns: ColumnElement[Any]) -> Select[Any]:
    """Samples of a status that is not final, in the words of the partial indexes."""
    return select(*columns).where(
        table.c.status == status, table.c.sampling_session_id.is_not(None), table.c.finished_at.is_(None)
    )


def check_claim(tx: Connection, operation: Operation, *, worker_id: str) -> None:
    """Make sure, in the transaction that completes a sample, that its claim stands.

    Raises:
        ClaimLostError: it was released, taken by another attempt, cancelled or completed.
    """
    table = tables.operation
    standing = update(table).where(
        table.c.id == operation.id,
        table.c.status == Status.RUNNING,
        table.c.worker_id == worker_id,
        table.c.attempts == operation.attempts,
    )
    if tx.execute(standing.values(claim_expires_at=None)).rowcount != 1:
        raise ClaimLostError(operation.request_id, operation.attempts)


def renew_claims(tx: Connection, operation_ids: Sequence[int], *, worker_id: str, expires_at: datetime) -> None:
    """Keep the samples a worker is busy with."""
    held = _held(operation_ids, worker_id)
    _change(tx, held, claim_expires_at=expires_at)


def standing_claims(tx: Connection, operation_ids: Sequence[int], *, worker_id: str) -> set[int]:
    """Those of these samples that a worker still has claimed: not cancelled, and not claimed by another."""
    table = tables.operation.c
    query = select(table.id).where(
        table.id.in_(operation_ids), table.worker_id == worker_id, table.status == Status.RUNNING
    )
    return set(tx.execute(query).scalars())


def release_claims(
    tx: Connection,
    *,
    now: datetime,
    worker_id: str | None = None,
    cause: Cause = Cause.UNKNOWN,
    had_company: bool = False,
) -> int:
    """Put samples back whose claim expired, or all that a worker (known to be gone) has claimed; returns how many.

    Args:
        cause: how the claims ended; what that is held against is in `suspects.py`.
        had_company: the worker was replaying a run too, so that no sample was alone.
    """
    table = tables.operation
    gone = table.c.worker_id == worker_id if worker_id is not None else table.c.claim_expires_at < now
    claimed = (table.c.status == Status.RUNNING, table.c.sampling_session_id.is_not(None), gone)
    values = suspects.values_after_death(cause, had_company=had_company)
    return _change(tx, claimed, status=Status.QUEUED, claim_expires_at=None, **values)


def give_back(tx: Connection, operations: Sequence[Operation], *, worker_id: str) -> None:
    """Put samples back that a worker has claimed and not begun; that was no attempt, and is held against nobody.

    Only the claim that stands is given back, so the number of an attempt is given out again only if whoever had it is
    known to have drawn nothing.
    """
    table = tables.operation.c
    claimed = [(operation.id, operation.attempts) for operation in operations]
    standing = (tuple_(table.id, table.attempts).in_(claimed), *_held_by(worker_id))
    innocent = {"attempts": table.attempts - 1, **suspects.values_after_death(Cause.STOPPED)}
    _change(tx, standing, status=Status.QUEUED, claim_expires_at=None, **innocent)


def _held(operation_ids: Sequence[int], worker_id: str) -> Sequence[ColumnElement[bool]]:
    return tables.operation.c.id.in_(operation_ids), *_held_by(worker_id)


def _held_by(worker_id: str) -> Sequence[ColumnElement[bool]]:
    table = tables.operation.c
    return table.worker_id == worker_id, table.status == Status.RUNNING


def _change(tx: Connection, wanted: Sequence[ColumnElement[bool]], **values: Any) -> int:
    """Set values of the operations that meet these conditions; returns how many there were."""
    table = tables.operation
    ids: Any = select(table.c.id).where(*wanted).order_by(table.c.id)
    if tx.dialect.name != "sqlite":
        ids = tx.execute(ids.with_for_update()).scalars().all()
    return tx.execute(update(table).where(table.c.id.in_(ids)).values(**values)).rowcount


def samples_wait(tx: Connection, *, suspect: bool = False, among: ColumnElement[bool] | None = None) -> bool:
    """Whether any sample is queued that may be drawn in company; or any that may not."""
    waiting = _queued_suspects() if suspect else _queued().where(tables.operation.c.suspect.is_(False))
    return tx.execute(waiting.where(_any(among)).limit(1)).first() is not None


def oldest_waiting_sample(tx: Connection, *, among: ColumnElement[bool] | None = None) -> int | None:
    """The queued sample that was accepted first."""
    found: int | None = tx.execute(_queued().where(_any(among)).limit(1)).scalar_one_or_none()
    return found


def _any(among: ColumnElement[bool] | None) -> ColumnElement[bool]:
    return true() if among is None else among
