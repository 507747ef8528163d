"""What uploads, snapshots, checkpoints, runs and sessions promise, on SQLite and on PostgreSQL."""

from collections.abc import Iterator
from datetime import timedelta

import pytest
from sqlalchemy import Connection, select

from storage import checkpoints, journal, leases, runs, snapshots, tables, uploads
from storage.database import Database
from storage.errors import LeaseLostError, RowNotFoundError, UploadGoneError
from storage.ids import CheckpointPath
from storage.runs import Run
from tests.factories import (
    LATER,
    MODEL,
    NOW,
    SHA256,
    complete,
    make_account,
    make_checkpoint,
    make_operation,
    make_run,
    make_sampling_session,
    make_session,
    make_upload,
)

SOON = NOW + timedelta(seconds=1)
AFTER = LATER + timedelta(seconds=1)


@pytest.fixture
def tx(database: Database) -> Iterator[Connection]:
    """A transaction, since what is tested here neither begins nor ends one."""
    with database.begin() as tx:
        yield tx


@pytest.fixture
def run(tx: Connection) -> Run:
    """A run without operations."""
    return make_run(tx)


def _state(tx: Connection, key: str) -> str | None:
    row = tables.stored_object
    return tx.execute(select(row.c.state).where(row.c.key == key)).scalar_one_or_none()


# ------------------------------------------------------------------------------------------------------------- uploads


def test_an_object_lives_from_its_announcement_until_it_is_released(tx: Connection) -> None:
    # Given
    make_upload(tx, "k")
    assert uploads.take_unwanted(tx, now=SOON, limit=5) == []
    # When
    uploads.reference(tx, "k", size_bytes=3)
    assert uploads.take_unwanted(tx, now=AFTER, limit=5) == []
    uploads.release(tx, "k")
    # Then
    assert uploads.take_unwanted(tx, now=SOON, limit=5) == ["k"]
    uploads.forget(tx, ["k"], now=SOON)
    assert _state(tx, "k") is None
    assert uploads.take_unwanted(tx, now=AFTER, limit=5) == []


def test_an_object_whose_deletion_failed_is_taken_again_and_never_needed_again(tx: Connection) -> None:
    # Given
    make_upload(tx, "k")
    uploads.reference(tx, "k", size_bytes=3)
    uploads.release(tx, "k")
    assert uploads.take_unwanted(tx, now=SOON, limit=5) == ["k"]
    # When
    uploads.keep(tx, "k")
    uploads.release(tx, "k")
    with pytest.raises(UploadGoneError):
        uploads.reference(tx, "k", size_bytes=3)
    # Then
    assert _state(tx, "k") == "deleting"
    assert uploads.take_unwanted(tx, now=SOON, limit=5) == ["k"]


def test_only_objects_that_are_being_deleted_are_forgotten(tx: Connection) -> None:
    # Given
    make_upload(tx, "k")
    uploads.reference(tx, "k", size_bytes=3)
    # When
    uploads.forget(tx, ["k"], now=SOON)
    # Then
    assert _state(tx, "k") == "referenced"


def test_an_upload_that_nobody_named_in_time_is_taken_and_a_late_reference_is_told(tx: Connection) -> None:
    # Given
    make_upload(tx, "k", expires_at=LATER)
    # When
    assert uploads.take_unwanted(tx, now=AFTER, limit=5) == ["k"]
    # Then
    with pytest.raises(UploadGoneError) as raised:
        uploads.reference(tx, "k", size_bytes=3)
    assert raised.value.key == "k"
    assert raised.value.retryable


def test_an_object_is_named_once_and_only_if_it_was_announced(tx: Connection) -> None:
    # Given
    make_upload(tx, "k")
    uploads.reference(tx, "k", size_bytes=3)
    # Then
    for key in ("k", "never announced"):
        with pytest.raises(UploadGoneError):
            uploads.reference(tx, key, size_bytes=3)


def test_unwanted_objects_are_taken_in_pages(tx: Connection) -> None:
    # Given
    for number in range(5):
        make_upload(tx, f"k{number}", expires_at=NOW)
    # When
    pages = []
    for _ in range(4):
        pages.append(uploads.take_unwanted(tx, now=SOON, limit=2))
        uploads.forget(tx, pages[-1], now=SOON)
    # Then
    assert [len(page) for page in pages] == [2, 2, 1, 0]
    assert len({key for page in pages for key in page}) == 5


# ----------------------------------------------------------------------------------------------------------- snapshots


def _add_snapshot(tx: Connection, lease: leases.Lease, seq: int, key: str | None = None) -> str:
    key = make_upload(tx, key or f"snapshot-{seq}")
    snapshots.add(tx, lease, seq=seq, object_key=key, data_sha256=SHA256, size_bytes=1, now=NOW)
    return key


def _lease(tx: Connection, run: Run, worker_id: str = "w") -> leases.Lease:
    return leases.acquire(tx, run.id, worker_id=worker_id, now=NOW, expires_at=LATER)


def test_the_two_newest_snapshots_are_kept_and_older_ones_released(tx: Connection, run: Run) -> None:
    # Given
    lease = _lease(tx, run)
    assert snapshots.newest_seq(tx, run.id) is None
    # When
    keys = [_add_snapshot(tx, lease, seq) for seq in (0, 3, 12)]
    # Then
    assert [(snapshot.seq, snapshot.object_key) for snapshot in snapshots.newest_first(tx, run.id)] == [
        (12, keys[2]),
        (3, keys[1]),
    ]
    assert snapshots.newest_seq(tx, run.id) == 12
    assert [_state(tx, key) for key in keys] == ["released", "referenced", "referenced"]


def test_a_snapshot_of_a_lost_lease_is_not_named(tx: Connection, run: Run) -> None:
    # Given
    lost = _lease(tx, run)
    leases.release_worker(tx, "w")
    # When
    with pytest.raises(LeaseLostError):
        _add_snapshot(tx, lost, 0)
    # Then
    assert snapshots.newest_first(tx, run.id) == []
    assert _state(tx, "snapshot-0") == "upload"


def test_a_snapshot_named_again_after_an_unknown_commit_changes_nothing(tx: Connection, run: Run) -> None:
    # Given
    lease = _lease(tx, run)
    key = _add_snapshot(tx, lease, 4)
    # When
    snapshots.add(tx, lease, seq=4, object_key=key, data_sha256=SHA256, size_bytes=1, now=LATER)
    # Then
    assert [snapshot.created_at for snapshot in snapshots.newest_first(tx, run.id)] == [NOW]
    assert _state(tx, key) == "referenced"


def test_a_snapshot_of_the_same_seq_takes_the_place_of_one_that_may_be_damaged(tx: Connection, run: Run) -> None:
    # Given
    lease = _lease(tx, run)
    good, damaged = _add_snapshot(tx, lease, 2, "good"), _add_snapshot(tx, lease, 4, "damaged")
    # When
    new = make_upload(tx, "new")
    snapshots.add(tx, lease, seq=4, object_key=new, data_sha256="1" * 64, size_bytes=2, now=LATER)
    # Then
    newest, before = snapshots.newest_first(tx, run.id)
    assert (newest.object_key, newest.sha256, newest.size_bytes) == (new, "1" * 64, 2)
    assert before.object_key == good
    assert [_state(tx, key) for key in (good, damaged, new)] == ["referenced", "released", "referenced"]


def test_a_snapshot_whose_object_was_swept_away_is_not_named(tx: Connection, run: Run) -> None:
    with pytest.raises(UploadGoneError):
        snapshots.add(tx, _lease(tx, run), seq=0, object_key="gone", data_sha256=SHA256, size_bytes=1, now=NOW)
    assert snapshots.newest_first(tx, run.id) == []


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_a_published_checkpoint_is_found_with_its_facts(tx: Connection, run: Run) -> None:
    # When
    made = make_checkpoint(tx, run, "step-1", key="weights", user_metadata={"é": "$type"}, expires_at=LATER)
    # Then
    assert str(made.path) == f"tinker://{run.id}/weights/step-1"
    assert (made.user_metadata, made.expires_at, made.public) == ({"é": "$type"}, LATER, False)
    assert made.lora == run.lora
    assert made.files == {"state": {"key": "weights", "size": 10}}
    assert _state(tx, "weights") == "referenced"
    assert checkpoints.list_of_run(tx, run.account_id, run.id, now=NOW) == [made]
    assert checkpoints.list_of_run(tx, "another", run.id, now=NOW) == []


def test_a_taken_name_is_overwritten_only_on_demand(tx: Connection, run: Run) -> None:
    # Given
    make_checkpoint(tx, run, "same", key="old")
    # When
    with pytest.raises(checkpoints.CheckpointExistsError, match="overwrite=True"):
        make_checkpoint(tx, run, "same", key="refused")
    assert (_state(tx, "old"), _state(tx, "refused")) == ("referenced", "upload")
    new = make_checkpoint(tx, run, "same", key="new", overwrite=True)
    # Then
    assert (_state(tx, "old"), _state(tx, "new")) == ("released", "referenced")
    assert checkpoints.list_of_run(tx, run.account_id, run.id, now=NOW) == [new]


def test_the_same_name_of_another_kind_is_another_checkpoint(tx: Connection, run: Run) -> None:
    # Given
    make_checkpoint(tx, run, "same")
    # When
    make_checkpoint(tx, run, "same", kind="sampler_weights")
    # Then
    assert checkpoints.count_of_account(tx, run.account_id, now=NOW) == 2


def test_an_expired_checkpoint_cannot_be_seen_and_its_name_is_free(tx: Connection, run: Run) -> None:
    # Given
    old = make_checkpoint(tx, run, "same", key="old", expires_at=SOON)
    # Then
    assert checkpoints.find(tx, old.path, now=NOW) == old
    assert checkpoints.find(tx, old.path, now=LATER) is None
    assert checkpoints.count_of_account(tx, run.account_id, now=LATER) == 0
    assert checkpoints.list_of_account(tx, run.account_id, now=LATER, limit=5, offset=0) == []
    make_checkpoint(tx, run, "same", key="new", now=LATER)
    assert _state(tx, "old") == "released"


def test_expired_checkpoints_are_removed_and_others_stay(tx: Connection, run: Run) -> None:
    # Given
    make_checkpoint(tx, run, "old", key="old", expires_at=SOON)
    make_checkpoint(tx, run, "later", key="later", expires_at=AFTER)
    make_checkpoint(tx, run, "never", key="never")
    # When
    assert checkpoints.remove_expired(tx, now=LATER, limit=5) == 1
    # Then
    assert [_state(tx, key) for key in ("old", "later", "never")] == ["released", "referenced", "referenced"]


def test_the_expiry_can_be_set_and_removed(tx: Connection, run: Run) -> None:
    # Given
    path = make_checkpoint(tx, run).path
    # When
    checkpoints.set_expiry(tx, run.account_id, path, expires_at=SOON, now=NOW)
    assert checkpoints.find(tx, path, now=LATER) is None
    checkpoints.set_expiry(tx, run.account_id, path, expires_at=None, now=NOW)
    # Then
    assert checkpoints.find(tx, path, now=LATER) is not None


def test_another_account_reads_only_what_is_public_and_changes_nothing(tx: Connection, run: Run) -> None:
    # Given
    other = make_account(tx, "other")
    path = make_checkpoint(tx, run).path
    missing = CheckpointPath(run.id, "weights", "missing")
    # Then: foreign and missing look the same
    with pytest.raises(RowNotFoundError) as foreign:
        checkpoints.get(tx, path, now=NOW, reader=other.id)
    with pytest.raises(RowNotFoundError) as absent:
        checkpoints.get(tx, missing, now=NOW, reader=other.id)
    assert str(foreign.value).replace("first", "missing") == str(absent.value)
    # When
    checkpoints.set_public(tx, run.account_id, path, public=True, now=NOW)
    # Then
    assert checkpoints.get(tx, path, now=NOW, reader=other.id).public
    for change in (
        lambda: checkpoints.remove(tx, other.id, path, now=NOW),
        lambda: checkpoints.set_public(tx, other.id, path, public=False, now=NOW),
        lambda: checkpoints.set_expiry(tx, other.id, path, expires_at=NOW, now=NOW),
    ):
        with pytest.raises(RowNotFoundError):
            change()
    assert checkpoints.list_of_account(tx, other.id, now=NOW, limit=5, offset=0) == []


def test_weights_of_a_removed_checkpoint_stay_while_a_sampling_session_draws_from_them(
    tx: Connection, run: Run
) -> None:
    # Given
    session = runs.get_session(tx, run.account_id, run.session_id)
    sampled, unused = make_checkpoint(tx, run, "a", key="sampled"), make_checkpoint(tx, run, "b", key="unused")
    make_sampling_session(tx, session, object_key="sampled")
    # When
    for checkpoint in (sampled, unused):
        checkpoints.remove(tx, run.account_id, checkpoint.path, now=NOW)
    # Then
    assert checkpoints.find(tx, sampled.path, now=NOW) is None
    assert (_state(tx, "sampled"), _state(tx, "unused")) == ("referenced", "released")


def test_weights_of_a_removed_checkpoint_stay_until_no_replay_may_load_them(tx: Connection, run: Run) -> None:
    # Given
    checkpoint = make_checkpoint(tx, run, key="w")
    complete(tx, make_operation(tx, make_run(tx), 0, "load_state", loads_key="w"))
    # When
    checkpoints.remove(tx, run.account_id, checkpoint.path, now=NOW)
    # Then
    assert _state(tx, "w") == "referenced"
    # When
    tx.execute(tables.operation.update().values(expired=True))
    checkpoints.release_unneeded(tx, ["w"])
    # Then
    assert _state(tx, "w") == "released"


def test_weights_that_were_released_while_they_were_being_loaded_are_kept(tx: Connection, run: Run) -> None:
    # Given
    checkpoint = make_checkpoint(tx, run, key="w")
    load = make_operation(tx, run, 0, "load_state")
    checkpoints.remove(tx, run.account_id, checkpoint.path, now=NOW)
    assert _state(tx, "w") == "released"
    # When
    journal.record_load(tx, load, "w")
    # Then
    assert _state(tx, "w") == "referenced"
    # When
    swept = make_operation(tx, run, 1, "load_state", loads_key="gone")
    # Then
    assert swept.loads_key == "gone"
    assert _state(tx, "gone") is None


def test_checkpoints_are_listed_newest_first_in_pages(tx: Connection, run: Run) -> None:
    # Given
    for name in ("a", "b", "c"):
        make_checkpoint(tx, run, name)
    # When
    pages = [checkpoints.list_of_account(tx, run.account_id, now=NOW, limit=2, offset=offset) for offset in (0, 2)]
    # Then
    assert [[checkpoint.name for checkpoint in page] for page in pages] == [["c", "b"], ["a"]]


# --------------------------------------------------------------------------------------------------- sessions and runs


def test_an_idempotency_key_gives_the_same_session_to_its_account_alone(tx: Connection) -> None:
    # Given
    acme, other = make_account(tx, "acme"), make_account(tx, "other")
    first = make_session(tx, acme, idempotency_key="k", tags=["a", "b"], user_metadata={"$type": "x"})
    # When
    again = make_session(tx, acme, idempotency_key="k", tags=["else"])
    # Then
    assert again == first
    assert (again.tags, again.user_metadata) == (["a", "b"], {"$type": "x"})
    assert make_session(tx, other, idempotency_key="k").id != first.id
    assert len({make_session(tx, acme).id for _ in range(2)}) == 2


def test_a_session_lives_by_heartbeats_and_ends_once(tx: Connection) -> None:
    # Given
    session = make_session(tx)
    assert runs.record_heartbeat(tx, session.account_id, session.id, now=SOON)
    # When
    for reason, at in (("completed", SOON), ("failed", LATER)):
        runs.finish_session(tx, session.account_id, session.id, reason=reason, detail=None, now=at)
    # Then
    ended = runs.get_session(tx, session.account_id, session.id)
    assert (ended.heartbeat_at, ended.finished_at, ended.finish_reason) == (SOON, SOON, "completed")
    assert not runs.record_heartbeat(tx, session.account_id, session.id, now=LATER)


def test_nothing_of_one_account_is_found_by_another(tx: Connection, run: Run) -> None:
    # Given
    other = make_account(tx, "other")
    sampling = make_sampling_session(tx, runs.get_session(tx, run.account_id, run.session_id))
    # Then
    for find in (
        lambda: runs.get_session(tx, other.id, run.session_id),
        lambda: runs.record_heartbeat(tx, other.id, run.session_id, now=NOW),
        lambda: runs.finish_session(tx, other.id, run.session_id, reason="r", detail=None, now=NOW),
        lambda: runs.get_run(tx, run.id, account_id=other.id),
        lambda: runs.get_sampling_session(tx, sampling.id, account_id=other.id),
    ):
        with pytest.raises(RowNotFoundError):
            find()
    assert runs.list_sessions(tx, other.id, limit=5) == []
    assert runs.list_runs(tx, other.id, limit=5) == []
    assert runs.count_runs(tx, other.id) == 0
    assert runs.list_sampling_sessions(tx, other.id, run.session_id) == []


def test_the_same_model_seq_id_gives_the_first_run(tx: Connection) -> None:
    # Given
    session = make_session(tx)
    first = make_run(tx, session=session, base_model=MODEL)
    # When
    again = make_run(tx, session=session, base_model="another")
    # Then
    assert again == first
    assert runs.find_run_of_session(tx, session.id, 0) == first
    assert runs.find_run_of_session(tx, session.id, 1) is None
    assert (first.state_seq, first.lease_epoch, first.num_failures) == (-1, 0, 0)


def test_runs_and_sessions_are_listed_newest_first(tx: Connection) -> None:
    # Given
    old, new = (make_session(tx, now=at) for at in (NOW, LATER))
    made = [make_run(tx, session=session, now=at) for session, at in ((old, NOW), (new, LATER))]
    # Then
    account_id = old.account_id
    assert [session.id for session in runs.list_sessions(tx, account_id, limit=5)] == [new.id, old.id]
    assert [run.id for run in runs.list_runs(tx, account_id, limit=1)] == [made[1].id]
    assert [run.id for run in runs.list_runs(tx, account_id, limit=5, offset=1)] == [made[0].id]
    assert [run.id for run in runs.list_runs(tx, account_id, limit=5, session_id=old.id)] == [made[0].id]
    assert runs.count_runs(tx, account_id) == 2


def test_the_same_sampling_session_number_gives_the_first_one_and_clones_are_counted(tx: Connection) -> None:
    # Given
    session = make_session(tx)
    first = make_sampling_session(tx, session, object_key="k", lora={"rank": 4})
    # When
    again = make_sampling_session(tx, session, object_key="other")
    # Then
    assert again == first
    assert first.lora == {"rank": 4}
    assert [runs.join_sampling_session(tx, first.id) for _ in range(3)] == [1, 2, 3]
    second = make_sampling_session(tx, session, number=1, now=LATER)
    assert runs.list_sampling_sessions(tx, session.account_id, session.id) == [first, second]


def test_a_run_of_any_number_of_operations_has_one_journal(tx: Connection, run: Run) -> None:
    # Given
    for seq in range(5):
        make_operation(tx, run, seq)
    # Then
    assert [op.seq for op in journal.list_operations(tx, run.id, limit=2, after_seq=1)] == [2, 3]
