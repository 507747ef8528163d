"""Operations whose result names weights: stored first, off the engine's thread, then committed with their rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import Connection

from jobs.operations import Outcome, Saved, SaveExternal, SaveForSampler, SaveState
from storage import checkpoints, ids, keys, runs, uploads
from storage.ids import CheckpointPath
from storage.open import Storage
from storage.runs import Run
from worker.engine.run_state import RunState

STATE_FILE = "state.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"

Save = SaveState | SaveForSampler | SaveExternal


@dataclass(frozen=True, eq=False)
class SavedWeights:
    """Weights in the object store, and how to name them in the transaction that completes the operation."""

    outcome: Outcome
    publish: Callable[[Connection], None]


@dataclass(frozen=True)
class _File:
    key: str
    size: int
    sha256: str


def copy_weights(state: RunState, body: Save) -> Mapping[str, bytes]:
    """The files to be stored, as copies: the run may move on. On the engine's thread."""
    if isinstance(body, SaveState):
        return {STATE_FILE: state.checkpoint_bytes()}
    return state.sampler_files()


def store_weights(storage: Storage, run: Run, seq: int, body: Save, files: Mapping[str, bytes]) -> SavedWeights:
    """Put the files, and prepare the rows that name them. In a background thread."""
    if isinstance(body, SaveForSampler) and body.name is None:
        return _ephemeral(storage, run, seq, body, files)
    return _checkpoint(storage, run, body, files)


def _checkpoint(storage: Storage, run: Run, body: Save, files: Mapping[str, bytes]) -> SavedWeights:
    path = CheckpointPath(run.id, _path_kind(body), str(body.name))
    stored = _put(storage, path, files)
    main = stored[STATE_FILE if isinstance(body, SaveState) else ADAPTER_FILE]
    size_bytes = sum(file.size for file in stored.values())

    def publish(tx: Connection) -> None:
        now = storage.database.now(tx)
        checkpoints.publish(
            tx,
            account_id=run.account_id,
            path=path,
            base_model=run.base_model,
            lora=run.lora,
            object_key=main.key,
            files={name: {"key": file.key, "size": file.size, "sha256": file.sha256} for name, file in stored.items()},
            size_bytes=size_bytes,
            user_metadata={} if isinstance(body, SaveExternal) else body.user_metadata,
            now=now,
            expires_at=None if body.ttl_s is None else now + timedelta(seconds=body.ttl_s),
            overwrite=isinstance(body, SaveState) and body.overwrite,
        )

    return SavedWeights(Saved(path=str(path), size_bytes=size_bytes), publish)


def _ephemeral(storage: Storage, run: Run, seq: int, body: SaveForSampler, files: Mapping[str, bytes]) -> SavedWeights:
    assert body.sampling_session_seq is not None
    number = body.sampling_session_seq
    path = CheckpointPath(run.id, "sampler_weights", f"ephemeral-{seq}")
    stored = _put(storage, path, {ADAPTER_FILE: files[ADAPTER_FILE]})[ADAPTER_FILE]

    def publish(tx: Connection) -> None:
        uploads.reference(tx, stored.key, size_bytes=stored.size, sha256=stored.sha256)
        runs.create_sampling_session(
            tx,
            account_id=run.account_id,
            session_id=run.session_id,
            sampling_session_seq_id=number,
            run_id=run.id,
            base_model=run.base_model,
            object_key=stored.key,
            lora=run.lora,
            now=storage.database.now(tx),
        )

    return SavedWeights(Saved(sampling_session_id=ids.sampling_session_id(run.session_id, number)), publish)


def _put(storage: Storage, path: CheckpointPath, files: Mapping[str, bytes]) -> dict[str, _File]:
    token = keys.new_token()
    stored = {}
    for filename, data in files.items():
        key = keys.checkpoint_key(path.run, path.kind, path.name, filename, token=token)
        stored[filename] = _File(key, len(data), storage.payloads.put_object(data, key))
    return stored


def _path_kind(body: Save) -> str:
    if isinstance(body, SaveState):
        return "weights"
    return "sampler_weights" if isinstance(body, SaveForSampler) else "external_weights"
