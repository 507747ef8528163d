"""Training runs coming to be: `create_model`, `load_weights` in both addressings, `get_info`."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from api import loading
from api.acceptance import accept_training, read_json_payload
from api.dependencies import CurrentKey, Joined, RawBody, json_of, parse_json
from api.errors import BadRequestError
from api.routes.training import fields_of, promise
from api.wire import bodies
from jobs.operations import Body, Kind
from storage import base_models, runs

router = APIRouter(prefix="/api/v1")


@router.post("/create_model")
def create_model(
    services: Joined, key: CurrentKey, body: Annotated[bodies.CreateModel, Depends(json_of(bodies.CreateModel))]
) -> dict[str, Any]:
    """Accept a new run with fresh weights."""
    return promise(loading.create_model(services, key.account_id, body))


@router.post("/load_weights")
def load_weights(services: Joined, key: CurrentKey, body: RawBody) -> dict[str, Any]:
    """Accept a new run from a checkpoint, or a load into a run that exists."""
    if loading.makes_a_run(body):
        created = bodies.parse(bodies.CreateByLoad, parse_json(body.data))
        return promise(loading.create_by_load(services, key.account_id, created))
    payload = read_json_payload(body)

    def read() -> Body:
        return loading.load_in_place(fields_of(payload))

    return promise(accept_training(services, key.account_id, payload.address, Kind.LOAD_STATE, read))


@router.post("/get_info")
def get_info(
    services: Joined, key: CurrentKey, body: Annotated[bodies.ModelOnly, Depends(json_of(bodies.ModelOnly))]
) -> dict[str, Any]:
    """On which base model a run stands, and by what its tokenizer is loaded."""
    with services.database.read() as tx:
        run = runs.get_run(tx, body.model_id, account_id=key.account_id)
        model = base_models.find_base_model(tx, run.base_model)
    return {
        "type": "get_info",
        "model_id": run.id,
        "model_name": run.base_model,
        "is_lora": True,
        "lora_rank": run.lora["rank"],
        "optimizer_config": {"type": run.optimizer},
        "model_data": {
            "model_name": run.base_model,
            "tokenizer_id": run.base_model if model is None else model.tokenizer_id,
            "arch": None if model is None else model.architecture,
        },
    }


@router.post("/create_custom_loss")
def create_custom_loss(_key: CurrentKey) -> dict[str, Any]:
    """Losses on the server are not served; the client computes custom losses itself unless told otherwise."""
    raise BadRequestError(
        "custom losses are not run on the server; forward_backward_custom with a Python function runs in the client"
    )
