"""Weights are stored first and named in the transaction that completes the operation."""

from datetime import timedelta

import pytest

from jobs.operations import Saved, SaveExternal, SaveForSampler, SaveState
from storage import checkpoints, runs, uploads
from storage.checkpoints import CheckpointExistsError
from storage.clock import FrozenClock
from storage.ids import CheckpointPath
from storage.leases import Lease
from storage.open import Storage
from storage.runs import Run
from tests.worker.stand_ins import StateStandIn, hold_run
from worker.saving import Save, SavedWeights, copy_weights, store_weights


@pytest.fixture
def held(storage: Storage, clock: FrozenClock) -> tuple[Run, Lease]:
    with storage.database.begin() as tx:
        return hold_run(tx, clock)


@pytest.fixture
def run(held: tuple[Run, Lease]) -> Run:
    return held[0]


def _store(storage: Storage, run: Run, body: Save, seq: int = 5) -> SavedWeights:
    return store_weights(storage, run, seq, body, copy_weights(StateStandIn(), body))  # type: ignore[arg-type]


def _publish(storage: Storage, saved: SavedWeights) -> None:
    with storage.database.begin() as tx:
        saved.publish(tx)


def _find(storage: Storage, path: str) -> checkpoints.Checkpoint | None:
    with storage.database.read() as tx:
        return checkpoints.find(tx, CheckpointPath.parse(path), now=storage.database.now(tx))


@pytest.mark.parametrize(
    ("body", "kind", "main", "content"),
    [
        (SaveState("step-1"), "weights", "state.safetensors", b"checkpoint of state"),
        (SaveForSampler("step-1"), "sampler_weights", "adapter_model.safetensors", b"adapter of state"),
        (SaveExternal("step-1"), "external_weights", "adapter_model.safetensors", b"adapter of state"),
    ],
)
def test_named_weights_become_a_checkpoint_of_their_kind(
    storage: Storage, run: Run, *, body: Save, kind: str, main: str, content: bytes
) -> None:
    # When
    saved = _store(storage, run, body)
    # Then it is stored and not yet named
    path = f"tinker://{run.id}/{kind}/step-1"
    assert isinstance(saved.outcome, Saved)
    assert saved.outcome.path == path
    assert _find(storage, path) is None
    # When
    _publish(storage, saved)
    # Then
    found = _find(storage, path)
    assert found is not None
    assert storage.objects.get(found.object_key) == content
    assert found.object_key == found.files[main]["key"]
    assert found.size_bytes == saved.outcome.size_bytes == sum(file["size"] for file in found.files.values())


def test_weights_that_were_not_named_are_swept_away(storage: Storage, run: Run, clock: FrozenClock) -> None:
    # Given
    _store(storage, run, SaveState("never-named"))
    # When
    clock.advance(storage.settings.upload_expiry_s + 1)
    # Then
    with storage.database.begin() as tx:
        assert len(uploads.take_unwanted(tx, now=clock.now(), limit=5)) == 1


def test_the_time_to_live_begins_when_the_checkpoint_is_published(
    storage: Storage, run: Run, clock: FrozenClock
) -> None:
    # Given
    saved = _store(storage, run, SaveState("short", ttl_s=60, user_metadata={"k": "v"}))
    clock.advance(100)
    # When
    _publish(storage, saved)
    # Then
    found = _find(storage, f"tinker://{run.id}/weights/short")
    assert found is not None
    assert found.expires_at == clock.now() + timedelta(seconds=60)
    assert found.user_metadata == {"k": "v"}


def test_a_taken_name_is_refused_unless_overwriting_was_asked_for(storage: Storage, run: Run) -> None:
    # Given
    _publish(storage, _store(storage, run, SaveState("same")))
    # Then
    again = _store(storage, run, SaveState("same"))
    with pytest.raises(CheckpointExistsError):
        _publish(storage, again)
    _publish(storage, _store(storage, run, SaveState("same", overwrite=True)))


def test_ephemeral_weights_become_a_sampling_session(storage: Storage, run: Run) -> None:
    # When
    saved = _store(storage, run, SaveForSampler(sampling_session_seq=4))
    _publish(storage, saved)
    # Then
    assert saved.outcome == Saved(sampling_session_id=f"{run.session_id}:sample:4")
    with storage.database.read() as tx:
        sampling = runs.get_sampling_session(tx, f"{run.session_id}:sample:4")
        assert checkpoints.list_of_run(tx, run.account_id, run.id, now=storage.database.now(tx)) == []
    assert (sampling.run_id, sampling.lora) == (run.id, run.lora)
    assert storage.objects.get(str(sampling.object_key)) == b"adapter of state"


def test_only_what_the_operation_needs_is_copied() -> None:
    # Given
    state = StateStandIn()
    # When
    for body in (SaveState("a"), SaveForSampler("a"), SaveExternal("a")):
        copy_weights(state, body)  # type: ignore[arg-type]
    # Then
    assert state.asked == ["checkpoint", "adapter", "adapter"]
