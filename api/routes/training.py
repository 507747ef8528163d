"""Operations of a training run: `forward_backward`, `forward`, `optim_step`."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header

from api.acceptance import TrainingPayload, accept_training, read_json_payload, read_protobuf_address
from api.dependencies import CurrentKey, Joined, RawBody
from api.limits import RequestBody
from api.services import Services
from api.wire import json_requests, requests, results
from jobs.operations import Body, Failure, ForwardBackward, Kind
from jobs.submit import Accepted
from jobs.validation import InvalidOperationError

router = APIRouter(prefix="/api/v1")


@router.post("/forward_backward")
def forward_backward(
    services: Joined, key: CurrentKey, body: RawBody, content_type: Annotated[str, Header()] = ""
) -> dict[str, Any]:
    """Accept a forward(-backward): protobuf, or JSON from SDK 0.16."""
    if results.MEDIA_TYPE not in content_type:
        return _forward_json(services, key.account_id, body, forward_only=False)
    where = read_protobuf_address(body)

    def read() -> ForwardBackward:
        if body.refusal is not None:
            raise InvalidOperationError(body.refusal)
        return requests.forward_backward(body.data)

    return promise(accept_training(services, key.account_id, where, Kind.FORWARD_BACKWARD, read))


@router.post("/forward")
def forward(services: Joined, key: CurrentKey, body: RawBody) -> dict[str, Any]:
    """Accept a forward as SDK 0.16 sends it."""
    return _forward_json(services, key.account_id, body, forward_only=True)


@router.post("/optim_step")
def optim_step(services: Joined, key: CurrentKey, body: RawBody) -> dict[str, Any]:
    """Accept an optimizer step."""
    payload = read_json_payload(body)

    def read() -> Body:
        return json_requests.optim_step(fields_of(payload))

    return promise(accept_training(services, key.account_id, payload.address, Kind.OPTIM_STEP, read))


def fields_of(payload: TrainingPayload) -> dict[str, Any]:
    """The fields of a body that could be read.

    Raises:
        InvalidOperationError: it could not.
    """
    if isinstance(payload.fields, Failure):
        raise InvalidOperationError(payload.fields.error)
    return payload.fields


def promise(accepted: Accepted) -> dict[str, Any]:
    """The answer to every submission: the request id to poll."""
    return {"request_id": accepted.request_id, "model_id": accepted.run_id}


def _forward_json(services: Services, account_id: str, body: RequestBody, *, forward_only: bool) -> dict[str, Any]:
    payload = read_json_payload(body)
    kind = Kind.FORWARD if forward_only else Kind.FORWARD_BACKWARD

    def read() -> Body:
        return json_requests.forward_backward(fields_of(payload), forward_only=forward_only)

    return promise(accept_training(services, account_id, payload.address, kind, read))
