"""The takeover protocol as a model: a run's row, lease, messages and snapshots, and workers that die at any step.

Every transaction is one step, as is every write that another process can see; between any two steps anything else may
happen. So a process that is stopped for long is one that takes no step meanwhile, and a lease or an upload row may
expire at any time, renewed or not.

Epochs are told apart only as far as the protocol does: a worker's is the row's, or it is an older one. Acquiring makes
all others' older, and so none ever becomes the row's again.

`Rules` turns single guards off, to see that the model notices.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple


class Rules(NamedTuple):
    """The protocol; each default is what piecework does."""

    workers: int = 2
    operations: int = 2
    writes_snapshots: bool = True
    zombies_upload: bool = True
    acquiring_raises_the_epoch: bool = True
    commits_check_the_epoch: bool = True
    unknown_commits_are_read_back: bool = True
    uploads_are_announced: bool = True
    naming_checks_the_upload: bool = True
    rows_are_doomed_before_objects: bool = True
    writers_remove_what_came_too_late: bool = True
    snapshots_kept: int = 2
    payloads_covered_by: int = 2
    snapshots_have_checksums: bool = True
    tails_are_replayed: bool = True
    stalled_work_is_announced: bool = True


class Phase(IntEnum):
    """Where a worker stands with the run."""

    IDLE = 0
    ACQUIRED = 1
    READY = 2
    COMPUTED = 3
    UNSURE = 4


class Lease(IntEnum):
    """The lease as the run's row has it."""

    FREE = 0
    HELD = 1
    EXPIRED = 2


class Row(IntEnum):
    """The row of an object; `DELETED` is the sweeper's knowledge that it has deleted the object of a doomed row."""

    NONE = 0
    UPLOAD = 1
    DOOMED = 2
    DELETED = 3


class Upload(NamedTuple):
    """A snapshot on its way, or what became of it: whether the writer has put it, and whether it lies there."""

    seq: int
    row: Row
    is_put: bool = False
    lies: bool = False
    is_current: bool = False


class Worker(NamedTuple):
    """A worker process: `seq` is the state in its memory, `end` the last operation it computed or has to replay."""

    phase: Phase = Phase.IDLE
    is_current: bool = False
    seq: int = -1
    end: int = -1
    looks: bool = False
    is_wrong: bool = False
    upload: Upload | None = None


class Snapshot(NamedTuple):
    """A named snapshot."""

    seq: int
    lies: bool = True
    is_damaged: bool = False


class World(NamedTuple):
    """Everything there is. Workers are kept sorted: which is which makes no difference.

    What nobody names any more and a row still knows is left out: nobody but the sweeper touches it again.
    """

    workers: tuple[Worker, ...]
    advances: tuple[int, ...]
    accepted: int = 0
    state_seq: int = -1
    was_wrong: bool = False
    lease: Lease = Lease.FREE
    message: bool = False
    snapshots: tuple[Snapshot, ...] = ()
    expired: int = 0
    has_stray: bool = False


Moves = Iterator[tuple[str, World]]
START = Snapshot(-1)


def begin(rules: Rules) -> World:
    """Nothing has been accepted."""
    return World((Worker(),) * rules.workers, (0,) * rules.operations)


# ---------------------------------------------------------------------------------------------------------- properties


def fault(rules: Rules, world: World) -> str | None:
    """Which property does not hold."""
    if max(world.advances) > 1:
        return "an operation took effect twice"
    if world.was_wrong:
        return "an operation took effect on a state that was not the run's"
    if not all(snapshot.lies for snapshot in world.snapshots):
        return "a named snapshot has no object"
    if _base(world, checked=True) is None:
        return "what a replay needs is gone"
    if world.has_stray:
        return "an object lies that no row knows"
    return None


def is_done(rules: Rules, world: World) -> bool:
    """Everything has been executed."""
    return world.state_seq == rules.operations - 1


def _base(world: World, *, checked: bool) -> Snapshot | None:
    """What the state can be made from again: the newest usable snapshot, or the run's beginning."""
    for snapshot in (*world.snapshots, START):
        if snapshot.lies and not (snapshot.is_damaged and checked):
            return snapshot if world.expired <= snapshot.seq + 1 else None
    raise AssertionError("the beginning is always usable")


# --------------------------------------------------------------------------------------------------------------- moves


def moves(rules: Rules, world: World) -> Moves:
    """Everything that may happen next."""
    yield from _clients_and_broker(rules, world)
    yield from _time(rules, world)
    yield from _sweeper(rules, world)
    for place, worker in enumerate(world.workers):
        if place and worker == world.workers[place - 1]:
            continue  # what it may do, its twin may do
        yield from _of_lease(rules, world, place)
        yield from _of_engine(rules, world, place)
        yield from _of_upload(rules, world, place)


def _clients_and_broker(rules: Rules, world: World) -> Moves:
    if world.accepted < rules.operations:
        accepted = world._replace(accepted=world.accepted + 1)
        yield "accept and announce", accepted._replace(message=True)
        yield "accept; the message is lost", accepted
    if world.message:
        yield "the message is lost", world._replace(message=False)
    waits = world.state_seq + 1 < world.accepted
    if rules.stalled_work_is_announced and waits and not world.message:
        yield "announce stalled work", world._replace(message=True)


def _time(rules: Rules, world: World) -> Moves:
    if world.lease == Lease.HELD:
        nobody = not any(worker.is_current for worker in world.workers)
        yield "the lease expires", world._replace(lease=Lease.FREE if nobody else Lease.EXPIRED)
    if not any(snapshot.is_damaged for snapshot in world.snapshots):
        for snapshot in world.snapshots:
            damaged = tuple(one._replace(is_damaged=one == snapshot) for one in world.snapshots)
            yield f"snapshot {snapshot.seq} is damaged", world._replace(snapshots=damaged)
    covered = [snapshot.seq for snapshot in world.snapshots[rules.payloads_covered_by - 1 :]]
    if covered and world.expired <= covered[0]:
        yield f"payload {world.expired} expires", world._replace(expired=world.expired + 1)


def _sweeper(rules: Rules, world: World) -> Moves:
    for place, worker in enumerate(world.workers):
        if worker.upload is not None:
            for name, row, lies in _swept(rules, worker.upload.row, worker.upload.lies):
                yield name, _with(world, place, worker._replace(upload=worker.upload._replace(row=row, lies=lies)))


def _swept(rules: Rules, row: Row, lies: bool) -> Iterator[tuple[str, Row, bool]]:
    """What the sweeper does next with an object whose announcement has expired."""
    if row == Row.UPLOAD:
        if rules.rows_are_doomed_before_objects:
            yield "doom an object", Row.DOOMED, lies
        else:
            yield "delete an object that is not doomed", row, False
    elif row == Row.DOOMED:
        yield "delete an object", Row.DELETED, False
    elif row == Row.DELETED:
        yield "forget an object", Row.NONE, lies


def _of_lease(rules: Rules, world: World, place: int) -> Moves:
    worker = world.workers[place]
    is_idle = worker.phase == Phase.IDLE
    if world.message and is_idle and world.lease != Lease.HELD:
        yield from _delivered("acquire", _acquire(rules, world, place))
    if world.message and not is_idle and not worker.looks:
        yield from _delivered("tell the holder", _with(world, place, worker._replace(looks=True)))
    if not is_idle or worker.upload is not None:
        yield "crash", _with(_crash(rules, world, worker), place, Worker())
    if is_idle or not worker.is_current:
        return
    if world.lease == Lease.EXPIRED:
        yield "renew the lease", world._replace(lease=Lease.HELD)
    free = world._replace(lease=Lease.FREE)
    yield "free the lease of a worker that is thought dead", _with(free, place, _outdated(rules, worker))
    if worker.phase == Phase.READY and not worker.looks and worker.upload is None:
        yield "release the lease", _with(free, place, Worker())


def _delivered(name: str, world: World) -> Moves:
    yield name, world._replace(message=False)
    yield f"{name}; the message comes again", world


def _acquire(rules: Rules, world: World, place: int) -> World:
    workers = world.workers
    if rules.acquiring_raises_the_epoch:
        workers = tuple(_outdated(rules, worker) for worker in workers)
    mine = Worker(Phase.ACQUIRED, is_current=True, end=world.state_seq, looks=True, upload=workers[place].upload)
    return _with(world._replace(workers=workers, lease=Lease.HELD), place, mine)


def _outdated(rules: Rules, worker: Worker) -> Worker:
    """A zombie: its epoch is older than the row's, now and for ever.

    What its commit or its naming will be refused for does not depend on what they hold, so that is forgotten. It looks
    for work by itself: a message that a zombie took is as if lost.
    """
    upload = worker.upload if rules.zombies_upload else None
    zombie = worker._replace(is_current=False, looks=worker.phase != Phase.IDLE)
    if not rules.commits_check_the_epoch:
        return zombie._replace(upload=None if upload is None else upload._replace(is_current=False))
    if worker.phase in (Phase.COMPUTED, Phase.UNSURE):
        zombie = zombie._replace(phase=Phase.COMPUTED, seq=-1, end=-1, is_wrong=False)
    return zombie._replace(upload=None if upload is None else upload._replace(is_current=False, seq=-1))


def _of_engine(rules: Rules, world: World, place: int) -> Moves:
    worker = world.workers[place]
    if worker.phase == Phase.ACQUIRED:
        base = _base(world, checked=rules.snapshots_have_checksums)
        if base is not None:
            replays = base.seq < worker.end
            wrong = base.is_damaged or (replays and not rules.tails_are_replayed)
            ready = worker._replace(phase=Phase.READY, seq=worker.end, end=-1, is_wrong=wrong)
            yield f"load snapshot {base.seq}{' and replay' * replays}", _with(world, place, ready)
    elif worker.phase in (Phase.COMPUTED, Phase.UNSURE):
        yield from _commit(rules, world, place)
    elif worker.phase == Phase.READY and worker.looks:
        if worker.seq + 1 >= world.accepted:
            yield "find nothing to do", _with(world, place, worker._replace(looks=False))
        for end in range(worker.seq + 1, world.accepted):
            computed = worker._replace(phase=Phase.COMPUTED, end=end)
            yield f"compute {worker.seq + 1} to {end}", _with(world, place, computed)


def _commit(rules: Rules, world: World, place: int) -> Moves:
    worker = world.workers[place]
    if rules.commits_check_the_epoch and not worker.is_current:
        yield "learn that the lease is lost", _with(world, place, Worker(upload=worker.upload))
        return
    written = world
    if world.state_seq < worker.end or not rules.unknown_commits_are_read_back:
        advances = tuple(count + (worker.seq < seq <= worker.end) for seq, count in enumerate(world.advances))
        written = world._replace(advances=advances, state_seq=worker.end, was_wrong=world.was_wrong or worker.is_wrong)
    unsure = worker._replace(phase=Phase.UNSURE)
    yield (
        f"commit {worker.seq + 1} to {worker.end}",
        _with(written, place, worker._replace(phase=Phase.READY, seq=worker.end, end=-1)),
    )
    if worker.phase == Phase.COMPUTED:
        yield f"commit {worker.seq + 1} to {worker.end}; the answer is lost", _with(written, place, unsure)
        yield f"the commit of {worker.seq + 1} to {worker.end} is lost", _with(world, place, unsure)


# ----------------------------------------------------------------------------------------------------------- snapshots


def _of_upload(rules: Rules, world: World, place: int) -> Moves:
    worker, upload = world.workers[place], world.workers[place].upload
    if upload is None:
        if worker.phase == Phase.READY and worker.seq >= 0 and _may_upload(rules, worker):
            row = Row.UPLOAD if rules.uploads_are_announced else Row.NONE
            counts = worker.is_current or not rules.commits_check_the_epoch
            begun = Upload(worker.seq if counts else -1, row, is_current=worker.is_current)
            yield f"announce snapshot {worker.seq}", _with(world, place, worker._replace(upload=begun))
    elif not upload.is_put:
        put = upload._replace(is_put=True, lies=True)
        yield f"put snapshot {upload.seq}", _with(world, place, worker._replace(upload=put))
    elif _may_name(rules, upload):
        named = _name(rules, world, Snapshot(upload.seq, lies=upload.lies and upload.row != Row.DOOMED))
        yield f"name snapshot {upload.seq}", _with(named, place, worker._replace(upload=None))
    else:
        given_up = _with(world, place, worker._replace(upload=None))
        stray = upload.lies and upload.row in (Row.NONE, Row.DELETED) and not rules.writers_remove_what_came_too_late
        yield f"give snapshot {upload.seq} up", given_up._replace(has_stray=stray)


def _may_upload(rules: Rules, worker: Worker) -> bool:
    return rules.writes_snapshots and (worker.is_current or rules.zombies_upload)


def _may_name(rules: Rules, upload: Upload) -> bool:
    if rules.commits_check_the_epoch and not upload.is_current:
        return False
    return upload.row == Row.UPLOAD or not rules.uploads_are_announced or not rules.naming_checks_the_upload


def _crash(rules: Rules, world: World, worker: Worker) -> World:
    """The process is gone in mid-upload; an object that was never announced is known to nobody."""
    upload = worker.upload
    stray = upload is not None and upload.lies and not rules.uploads_are_announced
    return world._replace(has_stray=world.has_stray or stray)


def _name(rules: Rules, world: World, new: Snapshot) -> World:
    """Add a snapshot in place of one of the same `seq`, and let go what is no longer kept."""
    others = [snapshot for snapshot in world.snapshots if snapshot.seq != new.seq]
    newest_first = sorted([*others, new], reverse=True)
    return world._replace(snapshots=tuple(newest_first[: rules.snapshots_kept]))


def _with(world: World, place: int, worker: Worker) -> World:
    workers = (*world.workers[:place], worker, *world.workers[place + 1 :])
    nobody = world.lease == Lease.EXPIRED and not any(worker.is_current for worker in workers)
    lease = Lease.FREE if nobody else world.lease  # of which nobody can tell the difference
    return world._replace(workers=tuple(sorted(workers, key=_order)), lease=lease)


def _order(worker: Worker) -> tuple[object, ...]:
    return (*worker[:-1], worker.upload or ())
