"""The arguments of routes."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Header, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel

from api import auth, limits
from api.errors import BadRequestError, TooLargeError
from api.limits import RequestBody
from api.services import Services
from api.wire import bodies
from storage.accounts import ApiKey

LARGE_BYTES = 65_536
"""JSON from this size on is parsed in a thread, so that other requests do not wait for it."""

AnyBody = TypeVar("AnyBody", bound=BaseModel)


def get_services(request: Request) -> Services:
    """What the app was made with."""
    services: Services = request.app.state.services
    return services


Joined = Annotated[Services, Depends(get_services)]


def get_key(services: Joined, x_api_key: Annotated[str | None, Header()] = None) -> ApiKey:
    """The API key of the request; its account is the one that everything is done for."""
    with services.database.read() as tx:
        return auth.authenticate(tx, x_api_key)


CurrentKey = Annotated[ApiKey, Depends(get_key)]


async def read_raw_body(request: Request, services: Joined, _key: CurrentKey) -> RequestBody:
    """The body of a training request, or what is left of one that is too large."""
    return await _read(request, services.settings.body_bytes_max)


RawBody = Annotated[RequestBody, Depends(read_raw_body)]


async def read_json(request: Request, services: Joined, _key: CurrentKey) -> dict[str, Any]:
    """The JSON object in the body; the key is checked before a byte is read."""
    body = await _read(request, services.settings.json_bytes_max)
    if body.refusal is not None:
        raise TooLargeError(body.refusal)
    if len(body.data) < LARGE_BYTES:
        return parse_json(body.data)
    return await run_in_threadpool(parse_json, body.data)


JsonBody = Annotated[dict[str, Any], Depends(read_json)]


def parse_json(data: bytes) -> dict[str, Any]:
    """The object that these bytes are.

    Raises:
        BadRequestError: not JSON, or not an object.
    """
    try:
        payload = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"the body is not JSON: {error}") from error
    if not isinstance(payload, dict):
        raise BadRequestError(f"the body must be a JSON object, got {type(payload).__name__}")
    return payload


def json_of(model: type[AnyBody]) -> Callable[[dict[str, Any]], Coroutine[Any, Any, AnyBody]]:
    """A dependency that reads the body as `model`."""

    async def read(payload: JsonBody) -> AnyBody:
        return bodies.parse(model, payload)

    return read


async def _read(request: Request, limit: int) -> RequestBody:
    encoding = request.headers.get("content-encoding", "").strip().lower()
    return await limits.read(request.stream(), encoding=encoding, limit=limit)
