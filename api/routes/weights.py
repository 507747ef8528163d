"""Saves, and what becomes of checkpoints: listed, published, expired, deleted, downloaded."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from api import checkpoint_files, schemas
from api.acceptance import accept_training, read_json_payload
from api.dependencies import CurrentKey, Joined, RawBody, json_of
from api.errors import BadRequestError
from api.limits import RequestBody
from api.parameters import Offset
from api.routes.training import fields_of, promise
from api.services import Services
from api.wire import bodies, json_requests
from jobs.operations import Body, Kind
from jobs.validation.checkpoints import check_ttl
from storage import checkpoints, runs
from storage.ids import CheckpointPath

router = APIRouter(prefix="/api/v1")

RUN_CHECKPOINT = "/training_runs/{run_id}/checkpoints/{kind}/{name}"
_READERS: dict[Kind, Callable[[dict[str, Any]], Body]] = {
    Kind.SAVE_STATE: json_requests.save_state,
    Kind.SAVE_FOR_SAMPLER: json_requests.save_for_sampler,
    Kind.SAVE_EXTERNAL: json_requests.save_external,
}


def checkpoint_path(run_id: str, kind: str, name: str) -> CheckpointPath:
    """The checkpoint that a route names."""
    return CheckpointPath(run_id, kind, name)


NamedCheckpoint = Annotated[CheckpointPath, Depends(checkpoint_path)]


@router.post("/save_weights")
def save_weights(services: Joined, key: CurrentKey, body: RawBody) -> dict[str, Any]:
    """Accept a save of weights and optimizer state."""
    return _save(services, key.account_id, body, Kind.SAVE_STATE)


@router.post("/save_weights_for_sampler")
def save_weights_for_sampler(services: Joined, key: CurrentKey, body: RawBody) -> dict[str, Any]:
    """Accept a save of weights to sample from."""
    return _save(services, key.account_id, body, Kind.SAVE_FOR_SAMPLER)


@router.post("/save_weights_external")
def save_weights_external(services: Joined, key: CurrentKey, body: RawBody) -> dict[str, Any]:
    """Accept a save of weights to download."""
    return _save(services, key.account_id, body, Kind.SAVE_EXTERNAL)


@router.post("/weights_info")
def weights_info(
    services: Joined, key: CurrentKey, body: Annotated[bodies.PathOnly, Depends(json_of(bodies.PathOnly))]
) -> dict[str, Any]:
    """What a checkpoint, of one's own or a public one, was trained on and with."""
    with services.database.read() as tx:
        now = services.database.now(tx)
        row = checkpoints.get(tx, parse_path(body.tinker_path), now=now, reader=key.account_id)
    return {
        "base_model": row.base_model,
        "is_lora": True,
        "lora_rank": row.lora["rank"],
        "train_unembed": row.lora["train_unembed"],
        "train_mlp": row.lora["train_mlp"],
        "train_attn": row.lora["train_attn"],
        "optimizer_config": {"type": "adamw"},
    }


@router.get("/checkpoints")
def list_checkpoints(
    services: Joined,
    key: CurrentKey,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    offset: Offset = 0,
) -> dict[str, Any]:
    """The account's checkpoints, newest first."""
    with services.database.read() as tx:
        now = services.database.now(tx)
        rows = checkpoints.list_of_account(tx, key.account_id, now=now, limit=limit, offset=offset)
        total = checkpoints.count_of_account(tx, key.account_id, now=now)
    return {
        "checkpoints": [schemas.checkpoint(row) for row in rows],
        "cursor": schemas.cursor(offset=offset, limit=limit, total=total),
    }


@router.get("/training_runs/{run_id}/checkpoints")
def list_checkpoints_of_run(services: Joined, key: CurrentKey, run_id: str) -> dict[str, Any]:
    """A run's checkpoints, newest first."""
    with services.database.read() as tx:
        run = runs.get_run(tx, run_id, account_id=key.account_id)
        rows = checkpoints.list_of_run(tx, key.account_id, run.id, now=services.database.now(tx))
    return {"checkpoints": [schemas.checkpoint(row) for row in rows]}


@router.delete(RUN_CHECKPOINT, status_code=204)
def delete_checkpoint(services: Joined, key: CurrentKey, path: NamedCheckpoint) -> Response:
    """Delete a checkpoint."""
    with services.database.begin() as tx:
        checkpoints.remove(tx, key.account_id, path, now=services.database.now(tx))
    return Response(status_code=204)


@router.post(f"{RUN_CHECKPOINT}/publish", status_code=204)
def publish_checkpoint(services: Joined, key: CurrentKey, path: NamedCheckpoint) -> Response:
    """Let every account read a checkpoint."""
    return _set_public(services, key.account_id, path, public=True)


@router.delete(f"{RUN_CHECKPOINT}/publish", status_code=204)
def unpublish_checkpoint(services: Joined, key: CurrentKey, path: NamedCheckpoint) -> Response:
    """Let only its own account read a checkpoint."""
    return _set_public(services, key.account_id, path, public=False)


@router.put(f"{RUN_CHECKPOINT}/ttl", status_code=204)
def set_ttl(
    services: Joined,
    key: CurrentKey,
    path: NamedCheckpoint,
    body: Annotated[bodies.Ttl, Depends(json_of(bodies.Ttl))],
) -> Response:
    """Set how long a checkpoint lives from now on, or that it stays."""
    if body.ttl_seconds is not None:
        check_ttl(body.ttl_seconds)
    with services.database.begin() as tx:
        now = services.database.now(tx)
        expires_at = None if body.ttl_seconds is None else now + timedelta(seconds=body.ttl_seconds)
        checkpoints.set_expiry(tx, key.account_id, path, expires_at=expires_at, now=now)
    return Response(status_code=204)


@router.get(f"{RUN_CHECKPOINT}/external_weights_urls")
def external_weights_urls(services: Joined, key: CurrentKey, request: Request, path: NamedCheckpoint) -> dict[str, Any]:
    """Signed links to the files of a checkpoint."""
    return checkpoint_files.links(services, key.account_id, path, base_url=str(request.base_url))


@router.get(f"{RUN_CHECKPOINT}/archive")
def archive(services: Joined, key: CurrentKey, request: Request, path: NamedCheckpoint) -> Response:
    """Redirect to a signed link to a tar of a checkpoint's files, for clients before 0.38."""
    return checkpoint_files.archive_redirect(services, key.account_id, path, base_url=str(request.base_url))


def parse_path(text: str) -> CheckpointPath:
    """A `tinker://` path.

    Raises:
        BadRequestError: it is none; says the form.
    """
    try:
        return CheckpointPath.parse(text)
    except ValueError as error:
        raise BadRequestError(str(error)) from error


def _save(services: Services, account_id: str, body: RequestBody, kind: Kind) -> dict[str, Any]:
    payload = read_json_payload(body)

    def read() -> Body:
        return _READERS[kind](fields_of(payload))

    return promise(accept_training(services, account_id, payload.address, kind, read))


def _set_public(services: Services, account_id: str, path: CheckpointPath, *, public: bool) -> Response:
    with services.database.begin() as tx:
        checkpoints.set_public(tx, account_id, path, public=public, now=services.database.now(tx))
    return Response(status_code=204)
