"""What nothing needs goes, rows first; what anything needs stays."""

from datetime import timedelta

import pytest
from sqlalchemy import Connection

from storage import checkpoints, journal, leases, runs, snapshots, sweeper, uploads
from storage.clock import FrozenClock
from storage.errors import ObjectStoreUnavailableError, UploadGoneError
from storage.open import Storage
from storage.payloads import PayloadStore
from storage.sweeper import Swept
from tests.factories import (
    LATER,
    NOW,
    SHA256,
    complete,
    make_checkpoint,
    make_operation,
    make_run,
    make_sample,
    make_sampling_session,
    make_upload,
)

DAY_S = 86_400.0
WEEK_S = 7 * DAY_S


def _sweep(storage: Storage, *, pass_s: float = 3600.0) -> Swept:
    return sweeper.sweep(
        storage.database,
        storage.objects,
        result_retention_s=WEEK_S,
        sampling_session_idle_s=DAY_S,
        pass_s=pass_s,
    )


def _finished_sample(storage: Storage, clock: FrozenClock) -> journal.Operation:
    payload, outcome = (storage.payloads.put(b"x" * 2_000, f"payloads/{name}") for name in ("in", "out"))
    with storage.database.begin() as tx:
        for stored in (payload, outcome):
            uploads.reference(tx, str(stored.key), size_bytes=stored.size_bytes)
        sample = make_sample(tx, make_sampling_session(tx), payload=payload, accepted_at=clock.now())
        complete(tx, sample, outcome=outcome, at=clock.now())
    return sample


def test_results_are_kept_for_the_retention_and_not_longer(storage: Storage, clock: FrozenClock) -> None:
    # Given
    sample = _finished_sample(storage, clock)
    clock.advance(WEEK_S - 1)
    assert _sweep(storage) == Swept(outcomes=0, checkpoints=0, objects=0)
    # When
    clock.advance(2)
    swept = _sweep(storage)
    # Then
    assert swept == Swept(outcomes=1, checkpoints=0, objects=2)
    assert not any(storage.objects.exists(f"payloads/{name}") for name in ("in", "out"))
    with storage.database.read() as tx:
        assert journal.get_operation(tx, sample.request_id).expired
    assert _sweep(storage) == Swept(outcomes=0, checkpoints=0, objects=0)


def test_an_upload_that_was_never_named_is_deleted_after_its_expiry(storage: Storage, clock: FrozenClock) -> None:
    # Given
    storage.payloads.put_object(b"x", "payloads/abandoned")
    assert _sweep(storage).objects == 0
    # When
    clock.advance(storage.settings.upload_expiry_s + 1)
    # Then
    assert _sweep(storage).objects == 1
    assert not storage.objects.exists("payloads/abandoned")


def test_an_object_that_is_put_after_its_upload_was_swept_away_is_deleted_too(
    storage: Storage, clock: FrozenClock
) -> None:
    # Given a writer that is stopped between announcing an object and putting it, until it counts as abandoned
    expiry_s = storage.settings.upload_expiry_s
    with storage.database.begin() as tx:
        expires_at = clock.now() + timedelta(seconds=expiry_s)
        make_upload(tx, "payloads/late", now=clock.now(), expires_at=expires_at)
    clock.advance(expiry_s + 1)
    _sweep(storage)
    # When it goes on
    storage.objects.put("payloads/late", b"x")
    with storage.database.begin() as tx, pytest.raises(UploadGoneError):
        uploads.reference(tx, "payloads/late", size_bytes=1)
    # Then the object goes once more, and its row with it
    clock.advance(expiry_s + 1)
    assert _sweep(storage) == Swept(objects=1)
    assert not storage.objects.exists("payloads/late")
    clock.advance(10 * expiry_s)
    assert _sweep(storage) == Swept()


def test_an_object_that_is_put_after_its_announcement_was_swept_away_is_removed_again(
    storage: Storage, clock: FrozenClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a writer that is stopped between the announcement and the put
    paused = PayloadStore(storage.database, storage.objects, inline_bytes_max=0, upload_expiry_s=0.0)
    real_put = storage.objects.put

    def put(key: str, data: bytes) -> object:
        clock.advance(1)
        assert _sweep(storage).objects == 1
        return real_put(key, data)

    monkeypatch.setattr(storage.objects, "put", put)
    # When it goes on
    paused.put_object(b"x", "payloads/late")
    # Then
    assert not storage.objects.exists("payloads/late")


def test_an_object_that_is_put_slowly_and_in_time_stays(storage: Storage) -> None:
    # Given
    slow = PayloadStore(storage.database, storage.objects, inline_bytes_max=0, upload_expiry_s=0.0)
    # When
    slow.put_object(b"x", "payloads/slow")
    # Then
    assert storage.objects.exists("payloads/slow")


def test_an_announced_object_that_was_never_put_is_no_error(storage: Storage, clock: FrozenClock) -> None:
    # Given
    with storage.database.begin() as tx:
        uploads.announce(tx, "payloads/never-put", now=clock.now(), expires_at=clock.now() + timedelta(seconds=1))
    # When
    clock.advance(2)
    # Then
    assert _sweep(storage).objects == 1


def test_an_expired_checkpoint_goes_with_its_weights(storage: Storage, clock: FrozenClock) -> None:
    # Given
    storage.objects.put("checkpoints/w", b"weights")
    with storage.database.begin() as tx:
        run = make_run(tx)
        expires_at = clock.now() + timedelta(seconds=10)
        path = make_checkpoint(tx, run, key="checkpoints/w", expires_at=expires_at).path
    # When
    clock.advance(11)
    swept = _sweep(storage)
    # Then
    assert (swept.checkpoints, swept.objects) == (1, 1)
    assert not storage.objects.exists("checkpoints/w")
    with storage.database.read() as tx:
        assert checkpoints.find(tx, path, now=clock.now()) is None


def test_weights_that_a_replay_may_load_stay_until_its_operation_is_forgotten(
    storage: Storage, clock: FrozenClock
) -> None:
    # Given
    storage.objects.put("checkpoints/w", b"weights")
    with storage.database.begin() as tx:
        source, run = make_run(tx), make_run(tx)
        checkpoint = make_checkpoint(tx, source, key="checkpoints/w")
        load = make_operation(tx, run, 0, "load_state", loads_key="checkpoints/w")
        complete(tx, load, at=clock.now())
        checkpoints.remove(tx, source.account_id, checkpoint.path, now=clock.now())
    _sweep(storage)
    assert storage.objects.exists("checkpoints/w")
    # When two snapshots cover it and the retention is over
    with storage.database.begin() as tx:
        _two_snapshots(tx, run.id)
    clock.advance(WEEK_S + 1)
    _sweep(storage)
    # Then
    assert not storage.objects.exists("checkpoints/w")


def _two_snapshots(tx: Connection, run_id: str) -> None:
    lease = leases.acquire(tx, run_id, worker_id="w", now=NOW, expires_at=LATER)
    for seq in (0, 1):
        key = make_upload(tx, f"snapshots/{seq}")
        snapshots.add(tx, lease, seq=seq, object_key=key, data_sha256=SHA256, size_bytes=1, now=NOW)


def test_an_object_store_that_fails_leaves_no_row_that_names_a_missing_object(
    storage: Storage, clock: FrozenClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given
    sample = _finished_sample(storage, clock)
    clock.advance(WEEK_S + 1)

    def refuse(_: object) -> None:
        raise ObjectStoreUnavailableError("store", "away")

    monkeypatch.setattr(storage.objects, "delete", refuse)
    # When
    with pytest.raises(ObjectStoreUnavailableError):
        _sweep(storage)
    # Then
    with storage.database.read() as tx:
        operation = journal.get_operation(tx, sample.request_id)
    assert (operation.payload.key, operation.outcome.key) == (None, None)


def test_weights_of_an_abandoned_sampling_session_go_and_those_of_a_live_one_stay(
    storage: Storage, clock: FrozenClock
) -> None:
    # Given
    storage.payloads.put_object(b"weights", "checkpoints/ephemeral")
    with storage.database.begin() as tx:
        uploads.reference(tx, "checkpoints/ephemeral", size_bytes=7)
        sampling = make_sampling_session(tx, object_key="checkpoints/ephemeral", now=clock.now())
    clock.advance(DAY_S - 1)
    assert _sweep(storage) == Swept()
    # When
    clock.advance(2)
    # Then
    assert _sweep(storage) == Swept(sampling_sessions=1, objects=1)
    assert not storage.objects.exists("checkpoints/ephemeral")
    with storage.database.read() as tx:
        assert runs.get_sampling_session(tx, sampling.id).ended_at == clock.now()


def _release_objects(storage: Storage, num: int) -> list[str]:
    keys = [f"payloads/{number}" for number in range(num)]
    for key in keys:
        storage.objects.put(key, b"x")
    with storage.database.begin() as tx:
        for key in keys:
            make_upload(tx, key)
            uploads.reference(tx, key, size_bytes=1)
        uploads.release(tx, *keys)
    return keys


def test_one_pass_deletes_all_there_is_and_not_a_page_only(storage: Storage) -> None:
    # Given
    keys = _release_objects(storage, 2 * sweeper.PAGE + 1)
    # Then
    assert _sweep(storage) == Swept(objects=len(keys))
    assert list(storage.objects.list("payloads/")) == []
    assert _sweep(storage) == Swept()


def test_one_pass_forgets_all_old_outcomes_and_not_a_page_only(storage: Storage, clock: FrozenClock) -> None:
    # Given
    num = sweeper.PAGE + 1
    with storage.database.begin() as tx:
        sampling = make_sampling_session(tx)
        for seq in range(num):
            complete(tx, make_sample(tx, sampling, seq), at=clock.now())
    # When
    clock.advance(WEEK_S + 1)
    # Then
    assert _sweep(storage) == Swept(outcomes=num)


def test_a_pass_ends_when_its_time_is_over_and_the_next_one_goes_on(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given
    monkeypatch.setattr(sweeper, "PAGE", 3)
    _release_objects(storage, 7)
    # When passes have no time for more than a page
    passes = [_sweep(storage, pass_s=0.0) for _ in range(4)]
    # Then
    assert [(swept.objects, swept.is_complete) for swept in passes] == [(3, False), (3, False), (1, True), (0, True)]


def test_objects_whose_deletion_failed_are_deleted_by_the_next_pass(
    storage: Storage, clock: FrozenClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given
    (released,) = _release_objects(storage, 1)
    storage.payloads.put_object(b"x", "payloads/slow")
    clock.advance(storage.settings.upload_expiry_s + 1)

    def refuse(_: object) -> None:
        raise ObjectStoreUnavailableError("store", "away")

    with monkeypatch.context() as patch:
        patch.setattr(storage.objects, "delete", refuse)
        with pytest.raises(ObjectStoreUnavailableError):
            _sweep(storage)
    # When the writer of the expired upload comes back meanwhile
    with storage.database.begin() as tx, pytest.raises(UploadGoneError):
        uploads.reference(tx, "payloads/slow", size_bytes=1)
    # Then
    assert _sweep(storage).objects == 2
    assert not any(storage.objects.exists(key) for key in (released, "payloads/slow"))
