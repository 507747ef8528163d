"""The newest state reaches storage in the background; a lost lease or a storage that is away does no harm."""

import threading
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from structlog.testing import capture_logs

from storage import leases, snapshots
from storage.clock import FrozenClock
from storage.errors import LeaseLostError, ObjectStoreUnavailableError
from storage.open import Storage
from tests.factories import make_run
from tests.worker.stand_ins import hold_run, make_active_run
from worker.active_run import ActiveRun
from worker.engine.run_state import StateCopy
from worker.writeback import UPLOADS_AT_ONCE, WriteBack, write_snapshot

PATIENCE_S = 60.0
TAIL_MAX_S = 30.0


@pytest.fixture
def woken() -> threading.Semaphore:
    return threading.Semaphore(0)


@pytest.fixture
def writeback(storage: Storage, woken: threading.Semaphore) -> Iterator[WriteBack]:
    started = WriteBack(storage, interval_s=3600, idle_s=3600, tail_max_s=TAIL_MAX_S, wake=woken.release)
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


def _refuse(*_: object, **__: object) -> None:
    raise ObjectStoreUnavailableError("store", "away")


def test_a_run_is_written_back_and_can_be_verified(
    storage: Storage, writeback: WriteBack, run: ActiveRun, woken: threading.Semaphore
) -> None:
    # When
    writeback.offer([run])
    assert _ended(woken)
    # Then
    assert (run.snapshot_seq, run.writing, run.is_dirty) == (3, False, False)
    with storage.database.read() as tx:
        (snapshot,) = snapshots.newest_first(tx, run.id)
    with closing(snapshots.read(storage.objects, snapshot)) as chunks:
        data = b"".join(chunks)
    assert b"snapshot of" in data
    assert len(data) == snapshot.size_bytes


@pytest.mark.parametrize("damage", [lambda data: data[:-1] + b"?", lambda data: data[:-1], lambda data: data + b"x"])
def test_damage_is_found_at_the_latest_when_everything_is_read(
    storage: Storage,
    writeback: WriteBack,
    run: ActiveRun,
    woken: threading.Semaphore,
    damage: Callable[[bytes], bytes],
) -> None:
    # Given
    writeback.offer([run])
    assert _ended(woken)
    with storage.database.read() as tx:
        (snapshot,) = snapshots.newest_first(tx, run.id)
    storage.objects.put(snapshot.object_key, damage(storage.objects.get(snapshot.object_key)))
    # When
    with (
        pytest.raises(snapshots.DamagedSnapshotError, match="does not match its checksum"),
        closing(snapshots.read(storage.objects, snapshot)) as chunks,
    ):
        list(chunks)


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
    writeback.offer([run])
    writeback.close()
    # Then
    assert _snapshots(storage, run) == []


def test_a_run_is_written_back_once_an_interval_unless_it_is_held(
    storage: Storage, writeback: WriteBack, run: ActiveRun, woken: threading.Semaphore
) -> None:
    # Given
    writeback.offer([run])
    assert _ended(woken)
    # When
    run.state_seq = 4
    run.tail.add(4, round((TAIL_MAX_S - 1) * 1e9))
    assert not writeback.holds(run)
    writeback.offer([run])
    assert not run.writing
    run.state_seq = 5
    run.tail.add(5, 2 * 10**9)
    assert writeback.holds(run)
    writeback.offer([run])
    assert _ended(woken)
    # Then
    assert _snapshots(storage, run) == [5, 3]
    writeback.offer([run])
    assert not writeback.holds(run)


def test_a_run_that_has_been_idle_for_long_is_written_back_whatever_the_interval(
    storage: Storage, writeback: WriteBack, run: ActiveRun, woken: threading.Semaphore
) -> None:
    # Given
    run.write_after = float("inf")
    writeback.offer([run])
    assert not run.writing
    # When
    run.used_at -= 4000
    writeback.offer([run])
    assert _ended(woken)
    # Then
    assert _snapshots(storage, run) == [3]


def test_a_run_at_its_bound_waits_for_its_upload_and_says_so_once(
    storage: Storage,
    writeback: WriteBack,
    run: ActiveRun,
    woken: threading.Semaphore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Given a store that is away, and a run whose tail is as long as it may be
    run.tail.add(3, round(TAIL_MAX_S * 1e9))
    with capture_logs() as logs:
        with monkeypatch.context() as away:
            away.setattr(storage.objects, "put", _refuse)
            for _ in range(3):
                run.write_after = 0.0
                assert writeback.holds(run)
                writeback.offer([run])
                assert _ended(woken)
        # When the store is back
        run.write_after = 0.0
        writeback.offer([run])
        assert _ended(woken)
        writeback.offer([run])
        # Then the run goes on by itself
        assert not writeback.holds(run)
    events = [line["event"] for line in logs if line["event"].startswith("run_")]
    assert events == ["run_waits_for_writeback", "run_goes_on"]


def test_of_many_runs_only_those_are_copied_whose_upload_begins_and_none_is_left_out(
    storage: Storage, clock: FrozenClock, woken: threading.Semaphore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given more runs than uploads there may be at once, and a store that answers when told to
    with storage.database.begin() as tx:
        runs = [make_active_run(*hold_run(tx, clock)) for _ in range(UPLOADS_AT_ONCE + 2)]
    go, put = threading.Semaphore(0), storage.objects.put

    def put_when_told(*args: object, **kwargs: object) -> None:
        assert go.acquire(timeout=PATIENCE_S)
        put(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(storage.objects, "put", put_when_told)
    writeback = WriteBack(storage, interval_s=0.0, idle_s=0.0, tail_max_s=TAIL_MAX_S, wake=woken.release)
    # When
    writeback.offer(runs)
    copied = [run for run in runs if run.writing]
    assert len(copied) == UPLOADS_AT_ONCE
    assert sum(len(run.state.asked) for run in runs) == UPLOADS_AT_ONCE  # type: ignore[union-attr]
    for _ in range(2):
        go.release()
        assert _ended(woken)
        for run in copied:
            run.state_seq += 1  # these go on, and are newer again
        writeback.offer(runs)
    # Then
    assert all(run.state.asked for run in runs)  # type: ignore[union-attr]
    go.release(UPLOADS_AT_ONCE)
    writeback.close()


def test_a_lost_lease_makes_the_run_in_memory_void(
    storage: Storage, writeback: WriteBack, run: ActiveRun, woken: threading.Semaphore
) -> None:
    # Given
    with storage.database.begin() as tx:
        leases.release_worker(tx, "w")
    # When
    writeback.offer([run])
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
    with monkeypatch.context() as away:
        away.setattr(storage.objects, "put", _refuse)
        writeback.offer([run])
        assert _ended(woken)
    assert (run.void, run.writing, run.is_dirty) == (False, False, True)
    run.write_after += 3600
    writeback.offer([run])
    assert not run.writing
    # When
    run.write_after = 0.0
    writeback.offer([run])
    assert _ended(woken)
    # Then
    assert _snapshots(storage, run) == [3]


def test_a_copy_that_finds_no_memory_is_taken_later_and_keeps_nothing(
    storage: Storage, writeback: WriteBack, run: ActiveRun, woken: threading.Semaphore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given
    assert run.state is not None
    copy = run.state.copy

    def refuse(_: object) -> StateCopy:
        raise MemoryError

    monkeypatch.setattr(run.state, "copy", refuse)
    for _ in range(UPLOADS_AT_ONCE + 1):
        writeback.offer([run])
        assert (run.writing, run.snapshot_seq) == (False, -1)
        run.write_after = 0.0
    # When
    monkeypatch.setattr(run.state, "copy", copy)
    writeback.offer([run])
    # Then
    assert _ended(woken)
    assert _snapshots(storage, run) == [3]


def test_leaving_writes_back_whatever_is_newer_than_its_snapshot(
    storage: Storage, writeback: WriteBack, run: ActiveRun, clock: FrozenClock
) -> None:
    # Given a run in the middle of its pause, one that is clean, and one whose lease went
    run.write_after = float("inf")
    with storage.database.begin() as tx:
        clean = make_active_run(*hold_run(tx, clock), snapshot_seq=3)
        gone = make_active_run(make_run(tx), run.lease, void=True)
    signs: list[None] = []
    # When
    writeback.flush([run, clean, gone], on_progress=lambda: signs.append(None))
    # Then
    assert [_snapshots(storage, one) for one in (run, clean, gone)] == [[3], [], []]
    assert len(signs) == 3


def test_a_snapshot_of_a_lost_lease_is_never_named(storage: Storage, run: ActiveRun) -> None:
    # Given
    with storage.database.begin() as tx:
        leases.release_worker(tx, "w")
    # When
    with pytest.raises(LeaseLostError):
        write_snapshot(storage, run.lease, 3, StateCopy({}, {"late": "yes"}))
    # Then
    assert _snapshots(storage, run) == []


def test_a_snapshot_found_damaged_no_longer_counts_as_the_one_to_fall_back_on(storage: Storage, run: ActiveRun) -> None:
    # Given two snapshots, the newer of which turned out damaged
    for seq in (1, 2):
        write_snapshot(storage, run.lease, seq, StateCopy({}, {"seq": str(seq)}))
    # When the next is stored
    write_snapshot(storage, run.lease, 3, StateCopy({}, {"seq": "3"}), damaged=[2])
    # Then the good one stays behind it, and with it what a replay from there needs
    assert _snapshots(storage, run) == [3, 1]
