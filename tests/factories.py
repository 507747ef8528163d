"""Rows and values with a default for everything, so that a test names only what it is about."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from sqlalchemy import Connection

from billing.charging import Bill
from billing.usage import Usage
from jobs.operations import Datum, ForwardBackward, LoraConfig, OptimStep, Sample, SamplingParams
from storage import accounts, base_models, checkpoints, ids, journal, runs, uploads
from storage.accounts import Account
from storage.base_models import BaseModel
from storage.checkpoints import Checkpoint
from storage.errors import RowNotFoundError
from storage.ids import CheckpointPath
from storage.journal import Operation, Refusal
from storage.payloads import Stored
from storage.runs import Run, SamplingSession, Session

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)
MODEL = "Qwen/Qwen3-tiny"
LORA = {"rank": 4, "seed": 0, "train_attn": True, "train_mlp": True, "train_unembed": True, "alpha": 32.0}
PAYLOAD = Stored(inline=b"payload", size_bytes=7)
OUTCOME = Stored(inline=b"outcome", size_bytes=7)
SHA256 = "0" * 64


# --------------------------------------------------------------------------------------------------------------- rows


def make_account(tx: Connection, name: str = "acme", *, now: datetime = NOW) -> Account:
    """The account of this name, added if there is none."""
    return accounts.find_account(tx, name) or accounts.create_account(tx, name, now=now)


def make_session(tx: Connection, account: Account | None = None, *, now: datetime = NOW, **changes: Any) -> Session:
    """A new session."""
    account = account or make_account(tx)
    return runs.create_session(
        tx, **{"account_id": account.id, "api_key_id": None, "now": now, "sdk_version": "0.38.0", **changes}
    )


def make_run(
    tx: Connection,
    account: Account | None = None,
    *,
    session: Session | None = None,
    model_seq_id: int = 0,
    now: datetime = NOW,
    **changes: Any,
) -> Run:
    """A new run without operations."""
    session = session or make_session(tx, account)
    values: dict[str, Any] = {
        "account_id": session.account_id,
        "session_id": session.id,
        "model_seq_id": model_seq_id,
        "base_model": MODEL,
        "lora": LORA,
        "optimizer": "adamw",
        "user_metadata": {},
        "now": now,
    }
    return runs.create_run(tx, **{**values, **changes})


def make_sampling_session(
    tx: Connection, session: Session | None = None, *, number: int = 0, now: datetime = NOW, **changes: Any
) -> SamplingSession:
    """A new sampling session on the base model."""
    session = session or make_session(tx)
    values: dict[str, Any] = {
        "account_id": session.account_id,
        "session_id": session.id,
        "sampling_session_seq_id": number,
        "base_model": MODEL,
        "now": now,
    }
    return runs.create_sampling_session(tx, **{**values, **changes})


def make_operation(
    tx: Connection,
    run: Run,
    seq: int = 0,
    kind: str = "forward_backward",
    *,
    payload: Stored = PAYLOAD,
    refusal: Refusal | None = None,
    accepted_at: datetime = NOW,
    loads_key: str | None = None,
) -> Operation:
    """Operation `seq` of a run, accepted."""
    request_id, _ = journal.accept_training(
        tx,
        account_id=run.account_id,
        run_id=run.id,
        seq=seq,
        kind=kind,
        base_model=run.base_model,
        payload=payload,
        now=accepted_at,
        refusal=refusal,
        gradients=kind == "forward_backward",
        loads_key=loads_key,
    )
    return journal.get_operation(tx, request_id)


def make_sample(
    tx: Connection, session: SamplingSession, seq: int = 0, *, payload: Stored = PAYLOAD, accepted_at: datetime = NOW
) -> Operation:
    """A sample, accepted."""
    request_id, _ = journal.accept_sample(
        tx,
        account_id=session.account_id,
        sampling_session_id=session.id,
        seq=seq,
        kind="sample",
        base_model=session.base_model,
        payload=payload,
        num_sequences=1,
        now=accepted_at,
    )
    return journal.get_operation(tx, request_id)


def complete(tx: Connection, operation: Operation, *, outcome: Stored = OUTCOME, at: datetime = NOW) -> None:
    """Play the worker: the operation is completed."""
    journal.complete(tx, operation, outcome, worker_id="w", now=at)


def make_upload(tx: Connection, key: str, *, now: datetime = NOW, expires_at: datetime = LATER) -> str:
    """An announced object; returns its key."""
    uploads.announce(tx, key, now=now, expires_at=expires_at)
    return key


def make_checkpoint(
    tx: Connection,
    run: Run,
    name: str = "first",
    *,
    kind: str = "weights",
    key: str | None = None,
    overwrite: bool = False,
    expires_at: datetime | None = None,
    now: datetime = NOW,
    user_metadata: Mapping[str, str] | None = None,
) -> Checkpoint:
    """A published checkpoint of one file."""
    path = CheckpointPath(run.id, kind, name)
    key = make_upload(tx, key or f"checkpoints/{ids.new_token()}/state", now=now)
    checkpoints.publish(
        tx,
        account_id=run.account_id,
        path=path,
        base_model=run.base_model,
        lora=run.lora,
        object_key=key,
        files={"state": {"key": key, "size": 10}},
        size_bytes=10,
        user_metadata=user_metadata or {},
        now=now,
        expires_at=expires_at,
        overwrite=overwrite,
    )
    found = checkpoints.find(tx, path, now=now)
    if found is None:
        raise RowNotFoundError("checkpoint", str(path))
    return found


def make_base_model(tx: Connection, name: str = MODEL, *, now: datetime = NOW, **changes: Any) -> BaseModel:
    """A base model that is served, without files."""
    values: dict[str, Any] = {
        "name": name,
        "source": "/somewhere",
        "tokenizer_id": name,
        "architecture": "Qwen3ForCausalLM",
        "dtype": "float32",
        "context_length": 128,
        "vocab_size": 100,
        "num_parameters": 1000,
        "tied_embeddings": True,
        "files": {},
        "created_at": now,
    }
    model = BaseModel(**{**values, **changes})
    base_models.add_base_model(tx, model)
    return model


# ------------------------------------------------------------------------------------------------------------- values


def make_datum(tokens: Sequence[int] = (1, 2, 3, 4), **inputs: Any) -> Datum:
    """A datum for `cross_entropy` that predicts each next token, unless other inputs are named."""
    tokens_N = np.asarray(tokens, dtype=np.int64)
    given: dict[str, Any] = inputs or {
        "target_tokens": np.roll(tokens_N, -1),
        "weights": np.ones(len(tokens_N), dtype=np.float32),
    }
    return Datum(tokens_N, given)


def make_forward_backward(num_data: int = 1, **changes: Any) -> ForwardBackward:
    """A `forward_backward` with `cross_entropy`."""
    values: dict[str, Any] = {"data": tuple(make_datum() for _ in range(num_data)), "loss_fn": "cross_entropy"}
    return ForwardBackward(**{**values, **changes})


def make_optim_step(**changes: Any) -> OptimStep:
    """An AdamW step with the defaults."""
    return OptimStep(**changes)


def make_sample_body(prompt: Sequence[int] = (1, 2, 3), *, max_tokens: int = 4, **changes: Any) -> Sample:
    """A sample of one continuation."""
    return Sample(
        np.asarray(prompt, dtype=np.int64), **{"params": SamplingParams(max_tokens=max_tokens, seed=1), **changes}
    )


def make_lora(**changes: Any) -> LoraConfig:
    """A small LoRA."""
    return LoraConfig(**{**LORA, **changes})


def bill(tx: Connection, run: Run, operation: Operation, used: Usage | None = None, *, now: datetime = NOW) -> None:
    """Write the usage record of a run's operation and its charge."""
    written = Bill(tx, now=now)
    written.add(used or make_usage(), operation, session_id=run.session_id, run_id=run.id)
    written.settle()


def make_usage(**changes: Any) -> Usage:
    """What an operation used."""
    return Usage(**{"device": "cpu", "device_ns": 1_000, "attempt": 1, "worker_id": "w", **changes})
