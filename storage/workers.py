"""Worker processes as the database knows them: where they run, whether they live, how busy they were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Select, func, select, update

from storage import rows, tables

_table = tables.worker


@dataclass(frozen=True)
class Worker:
    """One worker process.

    Attributes:
        device: e.g. `cpu` or `cuda:NVIDIA H100`.
        busy_ns: device time of every engine step, by a clock around the engine.
        overhead_ns: the part of it that is never billed: failed, replayed, discarded.
        ended_by: how it ended (`suspects.Cause`), as far as is known.
        num_replayed: operations it has executed again after taking a run over.
        num_replay_mismatches: those of them whose outcome was not the one on record.
        tail_p95_ns: device time that a death would have made others replay, 95th percentile of its latest commits.
        num_damaged_snapshots: snapshots it could not use.
        work_number: the newest report of its work that was added.
        under_way_ns: the part of its busy time that went into what is not done yet.
        rolled_up_ns: device time of its usage records that are rolled up.
    """

    id: str
    host: str
    pid: int
    device: str
    started_at: datetime
    seen_at: datetime
    stopped_at: datetime | None
    busy_ns: int
    overhead_ns: int
    ended_by: str | None
    num_replayed: int
    num_replay_mismatches: int
    tail_p95_ns: int
    num_damaged_snapshots: int
    work_number: int
    under_way_ns: int
    rolled_up_ns: int


@dataclass
class Work:
    """What a worker has done since it last said so; fields as those of `Worker`."""

    busy_ns: int = 0
    overhead_ns: int = 0
    num_replayed: int = 0
    num_replay_mismatches: int = 0
    num_damaged_snapshots: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(**{name: getattr(self, name) + getattr(other, name) for name in asdict(self)})


def register(tx: Connection, *, worker_id: str, host: str, pid: int, device: str, now: datetime) -> None:
    """Note that a worker has started; one that was given its id in the settings may start again."""
    facts = {"host": host, "pid": pid, "device": device, "started_at": now, "seen_at": now}
    anew = {"stopped_at": None, "ended_by": None}
    if not rows.insert_if_absent(tx, _table, id=worker_id, **facts):
        tx.execute(update(_table).where(_table.c.id == worker_id).values(**facts, **anew))


def record_seen(tx: Connection, worker_id: str, *, now: datetime) -> None:
    """Note that a worker lives."""
    tx.execute(update(_table).where(_table.c.id == worker_id).values(seen_at=now))


def work_number(tx: Connection, worker_id: str) -> int:
    """The number of the newest report of work that was added."""
    return _number_of(tx, _work_number(worker_id))


def locked_work_number(tx: Connection, worker_id: str) -> int:
    """The same, with the worker's row locked until the transaction ends."""
    query = _work_number(worker_id)
    if tx.dialect.name != "sqlite":
        query = query.with_for_update()
    return _number_of(tx, query)


def _work_number(worker_id: str) -> Select[Any]:
    return select(_table.c.work_number).where(_table.c.id == worker_id)


def _number_of(tx: Connection, query: Select[Any]) -> int:
    return tx.execute(query).scalar_one_or_none() or 0


def add_work(tx: Connection, worker_id: str, work: Work, *, number: int, under_way_ns: int, tail_p95_ns: int) -> None:
    """Add what a worker has done since its last report.

    Args:
        number: of the report, one more than `work_number`.
        under_way_ns: device time that went into what is not done yet.
    """
    sums = {_table.c[name]: _table.c[name] + amount for name, amount in asdict(work).items() if amount}
    facts = {_table.c.work_number: number, _table.c.under_way_ns: under_way_ns, _table.c.tail_p95_ns: tail_p95_ns}
    tx.execute(update(_table).where(_table.c.id == worker_id).values({**sums, **facts}))


def record_stopped(tx: Connection, worker_id: str, *, ended_by: str, now: datetime) -> None:
    """Note that a worker has ended, and how; what was noted first stands. What was under way was in vain."""
    running = update(_table).where(_table.c.id == worker_id, _table.c.stopped_at.is_(None))
    in_vain = {"overhead_ns": _table.c.overhead_ns + _table.c.under_way_ns, "under_way_ns": 0}
    tx.execute(running.values(stopped_at=now, ended_by=ended_by, **in_vain))


def find_worker(tx: Connection, worker_id: str) -> Worker | None:
    """The worker of this id, whether it runs or not."""
    row = tx.execute(select(_table).where(_table.c.id == worker_id)).one_or_none()
    return None if row is None else Worker(**row._mapping)


def list_workers(tx: Connection, *, seen_after: datetime) -> Sequence[Worker]:
    """Workers that run and were seen since."""
    query = select(_table).where(_table.c.seen_at > seen_after, _table.c.stopped_at.is_(None))
    return [Worker(**row._mapping) for row in tx.execute(query.order_by(_table.c.started_at))]


@dataclass(frozen=True)
class Alarms:
    """What no worker should ever see, counted over all workers there have been.

    Attributes:
        replay_mismatches: operations computed again whose outcome was not the one on record.
        damaged_snapshots: snapshots that could not be used.
    """

    replay_mismatches: int
    damaged_snapshots: int


def count_alarms(tx: Connection) -> Alarms:
    """Sums over all workers."""
    columns = (_table.c.num_replay_mismatches, _table.c.num_damaged_snapshots)
    row = tx.execute(select(*(func.coalesce(func.sum(column), 0) for column in columns))).one()
    return Alarms(int(row[0]), int(row[1]))
