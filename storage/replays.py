"""Which run a worker is computing again, so that a replay that ends its workers is set aside like any other poison.

A worker replays one run at a time, and others have their turns in between. So a death during a replay makes the run
suspect, unless somebody's training had begun: it is then replayed with no turns in between. Only deaths during that
count, in `run.replay_blame`, and weigh what `suspects.py` says. At the bound nobody replays the run any more: its
operations fail and say so. A replay that comes to its end clears everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Update, select, update

from storage import suspects, tables
from storage.suspects import Cause

if TYPE_CHECKING:
    from storage.leases import Lease

_run = tables.run


def begin(tx: Connection, lease: Lease) -> None:
    """Write down that this worker computes a run again; nothing happens if its lease is lost."""
    tx.execute(_held(lease).values(replayed_by=lease.worker_id))


def end(tx: Connection, lease: Lease) -> None:
    """The replay has come to its end, and is above suspicion; nothing happens if the lease is lost."""
    tx.execute(_held(lease).values(replayed_by=None, replays_alone=False, replay_blame=0))


def note_end(tx: Connection, run_ids: Sequence[str], cause: Cause, *, but_of: str | None = None) -> Sequence[bool]:
    """No worker replays these runs any more, and they are not whole yet.

    Args:
        run_ids: the caller has locked their rows.
        cause: how it came; what that is held against is above.
        but_of: a worker that stopped by itself, whatever the others did.

    Returns:
        For each of them that was being replayed, whether it was alone: then nothing else can be to blame.
    """
    columns = (_run.c.id, _run.c.replayed_by, _run.c.replays_alone, _run.c.replay_blame)
    replayed = tx.execute(select(*columns).where(_run.c.id.in_(run_ids), _run.c.replayed_by.is_not(None))).all()
    for run in replayed:
        values: dict[str, bool | int] = {}
        if cause is not Cause.STOPPED and run.replayed_by != but_of:
            blame = run.replay_blame + (suspects.UNIT[cause] if run.replays_alone else 0)
            values = {"replays_alone": True, "replay_blame": blame}
        tx.execute(update(_run).where(_run.c.id == run.id).values(replayed_by=None, **values))
    return [run.replays_alone for run in replayed]


def sentence(blame: int) -> str:
    """The error of every operation of a run whose replay has ended too many workers."""
    return (
        "the run's state cannot be brought back: computing again what follows its newest snapshot has "
        f"{suspects.history(blame)}, and is not tried again. Go on in a new run, from a checkpoint; and tell whoever "
        "runs the service: the logs of its workers say where they ended"
    )


def _held(lease: Lease) -> Update:
    return update(_run).where(
        _run.c.id == lease.run_id, _run.c.lease_epoch == lease.epoch, _run.c.lease_worker == lease.worker_id
    )
