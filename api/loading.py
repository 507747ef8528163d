"""How runs come to be: fresh, or from a checkpoint; and loads into a run that exists.

A run that cannot be made is accepted too, as one whose operation 0 has failed: the future says why.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from api.acceptance import FINISHED, unknown_base_model
from api.dependencies import parse_json
from api.errors import BadRequestError
from api.limits import RequestBody
from api.services import Services
from api.wire import bodies, json_requests
from jobs.operations import Failure, LoadState, LoraConfig
from jobs.submit import Accepted
from jobs.validation import InvalidOperationError
from jobs.validation.models import check_lora, check_optimizer
from storage import accounts, base_models, checkpoints, runs
from storage.checkpoints import Checkpoint
from storage.errors import RowNotFoundError
from storage.ids import CheckpointPath
from storage.runs import Session


def create_model(services: Services, account_id: str, body: bodies.CreateModel) -> Accepted:
    """Accept a run with fresh weights.

    Raises:
        RowNotFoundError: the account has no such session.
    """
    lora, failure = LoraConfig(), None
    with services.database.read() as tx:
        session = runs.get_session(tx, account_id, body.session_id)
        try:
            _check_session(session)
            _check_base_model(tx, body.base_model)
            check_optimizer(body.optimizer_config.type)
            lora = json_requests.lora_config(body.lora_config)
            check_lora(lora)
        except InvalidOperationError as error:
            failure = error.failure
    return services.submitter.create_model(
        session,
        model_seq_id=body.model_seq_id,
        base_model=body.base_model,
        lora=lora,
        optimizer=body.optimizer_config.type[:32],
        user_metadata=body.user_metadata,
        failure=failure,
    )


def create_by_load(services: Services, account_id: str, body: bodies.CreateByLoad) -> Accepted:
    """Accept a run whose weights, and optimizer state if asked for, are a checkpoint's.

    Raises:
        RowNotFoundError: the account has no such session.
    """
    with services.database.read() as tx:
        session = runs.get_session(tx, account_id, body.session_id)
        try:
            _check_session(session)
            check_optimizer(body.optimizer_config.type)
            checkpoint = _find_checkpoint(tx, services, account_id, body)
            _check_base_model(tx, body.base_model or checkpoint.base_model)
        except InvalidOperationError as error:
            return _failed_run(services, session, body, error.failure)
    return services.submitter.create_by_load(
        session,
        model_seq_id=body.model_seq_id,
        checkpoint=checkpoint,
        with_optimizer=body.optimizer,
        base_model=body.base_model,
        optimizer=body.optimizer_config.type,
        user_metadata=body.user_metadata,
    )


def makes_a_run(body: RequestBody) -> bool:
    """Whether a `load_weights` makes a run; else it loads into one that exists."""
    try:
        return "session_id" in parse_json(body.data)
    except BadRequestError:
        return False


def load_in_place(fields: dict[str, Any]) -> LoadState:
    """Read a load into a run that exists; its path is looked up in `seq` order, after the saves before it.

    Raises:
        InvalidOperationError: it cannot be read, or names no training checkpoint.
    """
    body = bodies.parse(bodies.LoadInPlace, fields)
    if body.weights_access_token is not None:
        raise InvalidOperationError(
            "weights_access_token: is read only where a load makes a run (create_training_client_from_state)"
        )
    path = _parse_path(body.path)
    _check_kind(path, with_optimizer=body.optimizer)
    return LoadState(str(path), body.optimizer)


def _failed_run(services: Services, session: Session, body: bodies.CreateByLoad, failure: Failure) -> Accepted:
    return services.submitter.create_model(
        session,
        model_seq_id=body.model_seq_id,
        base_model=body.base_model or "unknown",
        lora=LoraConfig(),
        user_metadata=body.user_metadata,
        failure=failure,
    )


def _find_checkpoint(tx: Connection, services: Services, account_id: str, body: bodies.CreateByLoad) -> Checkpoint:
    path = _parse_path(body.path)
    _check_kind(path, with_optimizer=body.optimizer)
    reader = account_id
    if body.weights_access_token is not None:
        key = accounts.find_key(tx, body.weights_access_token)
        if key is None:
            raise InvalidOperationError("weights_access_token: is not a valid API key")
        reader = key.account_id
    try:
        return checkpoints.get(tx, path, now=services.database.now(tx), reader=reader)
    except RowNotFoundError as error:
        raise InvalidOperationError(
            f"path: there is no checkpoint {str(path)!r} this account may read; `tinker checkpoint list` has its own"
        ) from error


def _parse_path(text: str) -> CheckpointPath:
    try:
        return CheckpointPath.parse(text)
    except ValueError as error:
        raise InvalidOperationError(f"path: {error}") from error


def _check_kind(path: CheckpointPath, *, with_optimizer: bool) -> None:
    if with_optimizer and path.kind != "weights":
        raise InvalidOperationError(
            f"path: {path.kind} hold no optimizer state; load a checkpoint of save_state, or with optimizer=false"
        )


def _check_base_model(tx: Connection, name: str) -> None:
    if base_models.find_base_model(tx, name) is None:
        raise InvalidOperationError(unknown_base_model(tx, name))


def _check_session(session: Session) -> None:
    if session.finished_at is not None:
        raise InvalidOperationError(FINISHED)
