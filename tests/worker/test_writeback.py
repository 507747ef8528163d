"""The newest state reaches storage in the background; a lost lease or a storage that is away does no harm."""

import threading
from collections.abc import Callable, Iterator

import pytest

from storage import leases, snapshots
from storage.clock import FrozenClock
from storage.errors import LeaseLostError, ObjectStoreUnavailableError
from storage.open import Storage
from tests.worker.stand_ins import hold_run, make_active_run
from worker.active_run import ActiveRun
from worker.writeback import WriteBack, write_snapshot

PATIENCE_S = 20.0


@pytest.fixture
def woken() -> threading.Semaphore:
    return threading.Semaphore(0)


@pytest.fixture
def writeback(storage: Storage, woken: threading.Semaphore) -> Iterator[WriteBack]:
    started = WriteBack(storage, interval_s=3600, wake=woken.release)
    yield started
    started.close()


@pytest.fixture
def run(storage: Storage, clock: FrozenClock) -> ActiveRun:
    """A run in memory whose state is newer than its snapshot."""
    with storage.database.begin() as tx:
        return make_active_run(*hold_run(tx, clock))


def _snapshots(storage: Storage, run: ActiveRun) -> list[int]:
    with storage.database.read() as tx:
        return [snapshot.seq for snapshot in snapshots.newest_first(tx, run.id)]


def _ended(woken: threading.Semaphore) -> bool:
    return woken.acquire(timeout=PATIENCE_S)


def test_an_idle_run_is_written_back_and_can_be_verified(
    storage: Storage, writeback: WriteBack, run: ActiveRun, woken: threading.Semaphore
) -> None:
    # When
    writeback.offer(run)
    assert _ended(woken)
    # Then
    assert (run.snapshot_seq, run.writing, run.is_dirty) == (3, False, False)
    with storage.database.read() as tx:
        (snapshot,) = snapshots.newest_first(tx, run.id)
    data = storage.objects.get(snapshot.object_key)
    assert data == b"snapshot of state"
    snapshots.verify(snapshot, data)
    with pytest.raises(snapshots.DamagedSnapshotError, match="does not match its checksum"):
        snapshots.verify(snapshot, data + b"x")


@pytest.mark.parametrize(
    "change",
    [
        lambda run: setattr(run, "snapshot_seq", 3),
        lambda run: setattr(run, "writing", True),
        lambda run: setattr(run, "void", True),
        lambda run: setattr(run, "state", None),
    ],
    ids=["clean", "in flight", "lease lost", "no state"],
)
def test_what_need_not_or_must_not_be_written_is_left(
    storage: Storage, writeback: WriteBack, run: ActiveRun, change: Callable[[ActiveRun], None]
) -> None:
    # Given
    change(run)
    # When
    writeback.offer(run)
    writeback.close()
    # Then
    assert _snapshots(storage, run) == []


def test_a_busy_run_is_written_back_once_an_interval(
    storage: Storage, writeback: WriteBack, run: ActiveRun, woken: threading.Semaphore
) -> None:
    # Given
    run.may_have_more = True
    run.written_at = -10_000.0
    writeback.offer(run)
    assert _ended(woken)
    # When
    run.state_seq = 4
    writeback.offer(run)
    # Then
    assert not run.writing
    run.may_have_more = False
    writeback.offer(run)
    assert _ended(woken)
    assert _snapshots(storage, run) == [4, 3]


def test_a_lost_lease_makes_the_run_in_memory_void(
    storage: Storage, writeback: WriteBack, run: ActiveRun, woken: threading.Semaphore
) -> None:
    # Given
    with storage.database.begin() as tx:
        leases.release_worker(tx, "w")
    # When
    writeback.offer(run)
    assert _ended(woken)
    # Then
    assert run.void
    assert _snapshots(storage, run) == []


def test_a_storage_that_is_away_is_tried_again_after_a_pause(
    storage: Storage,
    writeback: WriteBack,
    run: ActiveRun,
    woken: threading.Semaphore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Given
    def refuse(*_: object, **__: object) -> None:
        raise ObjectStoreUnavailableError("store", "away")

    with monkeypatch.context() as away:
        away.setattr(storage.objects, "put", refuse)
        writeback.offer(run)
        assert _ended(woken)
    assert (run.void, run.writing, run.is_dirty) == (False, False, True)
    writeback.offer(run)
    assert not run.writing
    # When
    run.write_after = 0.0
    writeback.offer(run)
    assert _ended(woken)
    # Then
    assert _snapshots(storage, run) == [3]


def test_a_snapshot_of_a_lost_lease_is_never_named(storage: Storage, run: ActiveRun) -> None:
    # Given
    with storage.database.begin() as tx:
        leases.release_worker(tx, "w")
    # When
    with pytest.raises(LeaseLostError):
        write_snapshot(storage, run.lease, 3, b"late")
    # Then
    assert _snapshots(storage, run) == []
