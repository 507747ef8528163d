"""From a request to an accepted operation: one that makes sense, or one that is failed from the start.

What always holds: once the key is valid and the run known, a training request gets a request id. Whatever is wrong with
it is the outcome of its future, because a refused `seq` would leave a gap for which later operations wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from api.dependencies import parse_json
from api.errors import BadRequestError
from api.limits import RequestBody
from api.services import Services
from api.wire import address, bodies
from api.wire.address import Address
from jobs.operations import Body, Failure, Kind
from jobs.submit import Accepted
from jobs.validation import InvalidOperationError, ModelFacts, check
from storage import base_models, runs
from storage.base_models import BaseModel

FINISHED = "the session was finished by its client; open a new one"
NO_ADDRESS = "model_id and seq_id (an integer from 1 on) cannot be read from the body"


@dataclass(frozen=True, eq=False)
class TrainingPayload:
    """A training request as JSON: where it belongs, and its fields or why they cannot be read."""

    address: Address
    fields: dict[str, Any] | Failure


def read_json_payload(body: RequestBody) -> TrainingPayload:
    """Read the JSON body of a training request, whole or as far as its address.

    Raises:
        BadRequestError: not even `model_id` and `seq_id` can be read, so it cannot be told where it belongs.
    """
    if body.refusal is not None:
        found = address.from_json(body.head, body.tail)
        return TrainingPayload(_checked(found, body.refusal), Failure(body.refusal))
    try:
        fields = parse_json(body.data)
    except BadRequestError as error:
        found = address.from_json(body.data[: address.HEAD_BYTES], body.data[-address.HEAD_BYTES :])
        return TrainingPayload(_checked(found, str(error)), Failure(str(error)))
    addressed = bodies.parse(bodies.Addressed, fields)
    return TrainingPayload(_checked(Address(addressed.model_id, addressed.seq_id), ""), fields)


def read_protobuf_address(body: RequestBody) -> Address:
    """Where a `ForwardBackwardRequest` belongs.

    Raises:
        BadRequestError: it cannot be told.
    """
    return _checked(address.from_protobuf(body.data if body.refusal is None else body.head), body.refusal or "")


def accept_training(
    services: Services, account_id: str, where: Address, kind: Kind, read: Callable[[], Body]
) -> Accepted:
    """Accept a training operation, as failed if its body cannot be read or makes no sense.

    Args:
        kind: recorded if the body cannot be read.
        read: makes the body; raises InvalidOperationError if it cannot.

    Raises:
        RowNotFoundError: the account has no such run.
    """
    with services.database.read() as tx:
        run = runs.get_run(tx, where.run_id, account_id=account_id)
        model = base_models.find_base_model(tx, run.base_model)
        session = runs.get_session(tx, account_id, run.session_id)
    if session.finished_at is not None:
        return services.submitter.training(run, where.seq, Failure(FINISHED), kind=kind)
    body: Body | Failure
    try:
        body = read()
        kind = body.kind
        check(body, facts_of(model, run.base_model))
    except InvalidOperationError as error:
        body = error.failure
    return services.submitter.training(run, where.seq, body, kind=kind)


def facts_of(model: BaseModel | None, name: str) -> ModelFacts:
    """What bounds operations on a base model.

    Raises:
        InvalidOperationError: it is not served (any more).
    """
    if model is None:
        raise InvalidOperationError(f"base_model: {name!r} is not served any more; ask the operator to add it again")
    return ModelFacts(model.name, model.vocab_size, model.context_length)


def unknown_base_model(tx: Connection, name: str) -> str:
    """What to say of a base model that is not served."""
    served = ", ".join(repr(model.name) for model in base_models.list_base_models(tx)) or "none yet"
    return f"base_model: {name!r} is not served here; served are: {served}"


def _checked(found: Address | None, why: str) -> Address:
    if found is None or found.seq < 1:
        raise BadRequestError(f"{why}; {NO_ADDRESS}" if why else NO_ADDRESS)
    return found
