"""What is accepted is durable, announced afterwards, and the same however often it is sent."""

from typing import Any

import pytest

from jobs import operations
from jobs.backlog import Backlog, BacklogFullError
from jobs.operations import Failure, Kind
from jobs.settings import JobsSettings
from jobs.submit import Submitter
from storage import journal, runs, uploads
from storage.database import Database
from storage.errors import ObjectStoreUnavailableError
from storage.journal import Operation, Status
from storage.open import Storage
from storage.runs import Run, Session
from tests.factories import (
    MODEL,
    NOW,
    complete,
    make_account,
    make_checkpoint,
    make_forward_backward,
    make_lora,
    make_optim_step,
    make_run,
    make_sample_body,
    make_sampling_session,
    make_session,
)
from tests.jobs.journal_reader import CheckedAnnouncements


@pytest.fixture
def announced(database: Database) -> CheckedAnnouncements:
    return CheckedAnnouncements(database=database)


@pytest.fixture
def submitter(storage: Storage, announced: CheckedAnnouncements) -> Submitter:
    return Submitter(storage, announced, Backlog.of(storage.database, JobsSettings()))


@pytest.fixture
def session(database: Database) -> Session:
    with database.begin() as tx:
        return make_session(tx)


@pytest.fixture
def run(submitter: Submitter, session: Session, database: Database) -> Run:
    """A run whose operation 0 was accepted."""
    accepted = submitter.create_model(session, model_seq_id=0, base_model=MODEL, lora=make_lora())
    with database.read() as tx:
        return runs.get_run(tx, str(accepted.run_id))


def _read(database: Database, request_id: str) -> Operation:
    with database.read() as tx:
        return journal.get_operation(tx, request_id)


def _body(storage: Storage, operation: Operation) -> Any:
    return operations.decode(storage.payloads.get(operation.payload))


def test_a_new_run_has_its_operation_0_and_is_announced_after_the_commit(
    submitter: Submitter, storage: Storage, session: Session, announced: CheckedAnnouncements
) -> None:
    # When
    accepted = submitter.create_model(session, model_seq_id=3, base_model=MODEL, lora=make_lora(rank=8, seed=5))
    # Then
    assert accepted.request_id == f"{session.id}:train:3:0"
    operation = _read(storage.database, accepted.request_id)
    assert (operation.kind, operation.status) == (Kind.CREATE_MODEL, Status.QUEUED)
    assert _body(storage, operation).lora == make_lora(rank=8, seed=5)
    assert announced.runs == [accepted.run_id]
    assert announced.found_the_row == [True]


def test_the_same_model_seq_id_again_gives_the_first_run_with_its_first_seed(
    submitter: Submitter, storage: Storage, session: Session
) -> None:
    # Given
    first = submitter.create_model(session, model_seq_id=0, base_model=MODEL, lora=make_lora(seed=1))
    # When
    again = submitter.create_model(session, model_seq_id=0, base_model=MODEL, lora=make_lora(seed=2))
    # Then
    assert again == first
    assert _body(storage, _read(storage.database, first.request_id)).lora.seed == 1


def test_a_small_payload_lies_in_the_row(submitter: Submitter, storage: Storage, run: Run) -> None:
    # When
    accepted = submitter.training(run, 1, make_optim_step(learning_rate=0.5), kind=Kind.OPTIM_STEP)
    # Then
    operation = _read(storage.database, accepted.request_id)
    assert operation.payload.key is None
    assert _body(storage, operation).learning_rate == 0.5


def test_a_large_payload_lies_in_the_object_store_and_is_named(
    submitter: Submitter, storage: Storage, run: Run
) -> None:
    # When
    accepted = submitter.training(run, 1, make_forward_backward(num_data=50), kind=Kind.FORWARD_BACKWARD)
    # Then
    operation = _read(storage.database, accepted.request_id)
    assert operation.payload.inline is None
    assert operation.payload.key is not None
    assert len(_body(storage, operation).data) == 50
    with storage.database.begin() as tx:
        later = storage.database.after(tx, 10 * storage.settings.upload_expiry_s)
        assert uploads.take_unwanted(tx, now=later, limit=5) == []


def test_a_repeated_large_operation_is_not_stored_again(submitter: Submitter, storage: Storage, run: Run) -> None:
    # Given
    body = make_forward_backward(num_data=50)
    first = submitter.training(run, 1, body, kind=Kind.FORWARD_BACKWARD)
    # When
    again = submitter.training(run, 1, body, kind=Kind.FORWARD_BACKWARD)
    # Then
    assert again == first
    operation = _read(storage.database, first.request_id)
    with storage.database.begin() as tx:
        later = storage.database.after(tx, 10 * storage.settings.upload_expiry_s)
        assert uploads.take_unwanted(tx, now=later, limit=5) == []
    assert len(_body(storage, operation).data) == 50


def test_an_operation_whose_payload_cannot_be_stored_is_not_accepted(
    submitter: Submitter, storage: Storage, run: Run, announced: CheckedAnnouncements, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given
    def refuse(*_: object, **__: object) -> None:
        raise ObjectStoreUnavailableError("store", "full")

    monkeypatch.setattr(storage.objects, "put", refuse)
    before = list(announced.runs)
    # When
    with pytest.raises(ObjectStoreUnavailableError):
        submitter.training(run, 1, make_forward_backward(num_data=50), kind=Kind.FORWARD_BACKWARD)
    # Then
    with storage.database.read() as tx:
        assert journal.find_operation(tx, f"{run.id}:1") is None
    assert announced.runs == before


def test_an_invalid_operation_is_accepted_as_failed_and_counted(
    submitter: Submitter, storage: Storage, run: Run, announced: CheckedAnnouncements
) -> None:
    # When
    accepted = submitter.training(run, 1, Failure("empty datum"), kind=Kind.FORWARD_BACKWARD)
    # Then
    operation = _read(storage.database, accepted.request_id)
    assert (operation.status, operation.error, operation.failure_number) == (Status.FAILED, "empty datum", None)
    assert announced.runs[-1] == run.id


def test_operations_of_a_run_that_was_never_made_fail_and_say_why(
    submitter: Submitter, storage: Storage, session: Session
) -> None:
    # Given
    refused = submitter.create_model(
        session, model_seq_id=0, base_model="none", lora=make_lora(), failure=Failure("there is no base model 'none'")
    )
    with storage.database.read() as tx:
        stillborn = runs.get_run(tx, str(refused.run_id))
    # When
    accepted = submitter.training(stillborn, 1, make_optim_step(), kind=Kind.OPTIM_STEP)
    # Then
    error = str(_read(storage.database, accepted.request_id).error)
    assert error == "the training run was never made: there is no base model 'none'"


def test_a_run_made_by_loading_keeps_the_weights_it_loads(
    submitter: Submitter, storage: Storage, session: Session
) -> None:
    # Given
    with storage.database.begin() as tx:
        source = make_run(tx, session=session, model_seq_id=7)
        checkpoint = make_checkpoint(tx, source, key="weights")
    # When
    accepted = submitter.create_by_load(session, model_seq_id=8, checkpoint=checkpoint, with_optimizer=True)
    # Then
    operation = _read(storage.database, accepted.request_id)
    assert (operation.kind, operation.loads_key) == (Kind.LOAD_STATE, "weights")
    body = _body(storage, operation)
    assert (body.object_key, body.path, body.with_optimizer) == ("weights", str(checkpoint.path), True)
    with storage.database.read() as tx:
        assert runs.get_run(tx, str(accepted.run_id)).lora == source.lora


def test_samples_are_announced_once_each_and_refused_ones_not_at_all(
    submitter: Submitter, storage: Storage, session: Session, announced: CheckedAnnouncements
) -> None:
    # Given
    with storage.database.begin() as tx:
        sampling = make_sampling_session(tx, session)
    # When
    first = submitter.sample(sampling, 0, make_sample_body(), num_samples=2)
    again = submitter.sample(sampling, 0, make_sample_body(), num_samples=2)
    refused = submitter.sample(sampling, 1, Failure("bad temperature"), num_samples=1)
    # Then
    assert first == again
    assert announced.samples == 1
    assert _read(storage.database, first.request_id).num_sequences == 2
    assert _read(storage.database, refused.request_id).error == "bad temperature"


def test_a_late_repetition_of_a_completed_operation_gives_its_request_id(
    submitter: Submitter, storage: Storage, run: Run
) -> None:
    # Given
    accepted = submitter.training(run, 1, make_optim_step(), kind=Kind.OPTIM_STEP)
    with storage.database.begin() as tx:
        complete(tx, journal.get_operation(tx, accepted.request_id), at=NOW)
    # When
    again = submitter.training(run, 1, Failure("now it is bad"), kind=Kind.OPTIM_STEP)
    # Then
    assert again == accepted
    assert _read(storage.database, accepted.request_id).status == Status.COMPLETED


def test_accounts_are_kept_apart(submitter: Submitter, database: Database, session: Session) -> None:
    # Given
    with database.begin() as tx:
        other = make_session(tx, make_account(tx, "other"))
    # When
    mine = submitter.create_model(session, model_seq_id=0, base_model=MODEL, lora=make_lora())
    theirs = submitter.create_model(other, model_seq_id=0, base_model=MODEL, lora=make_lora())
    # Then
    assert mine.request_id != theirs.request_id
    assert _read(database, theirs.request_id).account_id == other.account_id


def test_where_all_room_is_taken_a_missing_operation_that_others_wait_for_is_accepted(
    storage: Storage, announced: CheckedAnnouncements, run: Run
) -> None:
    # Given: operations 2 and 3 have come before operation 1, and then there was no more room
    full = Backlog.of(storage.database, JobsSettings(queued_max_per_account=3, queued_training_factor=1.0))
    submitter = Submitter(storage, announced, full)
    for seq in (2, 3):
        submitter.training(run, seq, make_optim_step(), kind=Kind.OPTIM_STEP)
    # When
    late = submitter.training(run, 1, make_optim_step(), kind=Kind.OPTIM_STEP)
    # Then
    assert _read(storage.database, late.request_id).seq == 1
    with pytest.raises(BacklogFullError):
        submitter.training(run, 4, make_optim_step(), kind=Kind.OPTIM_STEP)


def test_a_refused_operation_far_ahead_makes_no_room_for_others(
    storage: Storage, announced: CheckedAnnouncements, run: Run
) -> None:
    # Given: an operation that failed from the start waits for nothing
    full = Backlog.of(storage.database, JobsSettings(queued_max_per_account=1, queued_training_factor=1.0))
    submitter = Submitter(storage, announced, full)
    submitter.training(run, 10**9, make_optim_step(), kind=Kind.OPTIM_STEP)
    # When
    with pytest.raises(BacklogFullError):
        submitter.training(run, 1, make_optim_step(), kind=Kind.OPTIM_STEP)
