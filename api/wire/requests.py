"""The protobuf body of `forward_backward` → the operation it asks for."""

from __future__ import annotations

import numpy as np
from google.protobuf.message import DecodeError

from api import tinker_public_pb2 as pb
from api.wire import tensors
from jobs.operations import Array, Datum, ForwardBackward
from jobs.validation.errors import InvalidOperationError

NO_IMAGES = "images are not supported by the base models served here; send encoded_text chunks"
NO_AUDIO = "audio (dmel) is not supported by the base models served here; send encoded_text chunks"


def forward_backward(data: bytes) -> ForwardBackward:
    """Read a `ForwardBackwardRequest`.

    Raises:
        InvalidOperationError: not such a message, or a chunk or tensor in it cannot be read; names the datum.
    """
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise InvalidOperationError(f"the body is not a ForwardBackwardRequest: {error}") from error
    budget = tensors.CellBudget()
    return ForwardBackward(
        data=tuple(_datum(datum, f"data[{index}]", budget) for index, datum in enumerate(message.data)),
        loss_fn=message.loss_fn,
        loss_config=_loss_config(message),
        forward_only=message.forward_only,
    )


def _loss_config(message: pb.ForwardBackwardRequest) -> dict[str, float | str]:
    config: dict[str, float | str] = dict(message.loss_fn_config)
    for key, value in message.loss_fn_config_v2.items():
        config[key] = value.text if value.WhichOneof("value") == "text" else value.number
    return config


def _datum(datum: pb.Datum, where: str, budget: tensors.CellBudget) -> Datum:
    chunks = [_chunk(chunk, f"{where}.model_input[{index}]") for index, chunk in enumerate(datum.model_input)]
    return Datum(
        tokens=np.concatenate(chunks) if chunks else np.zeros(0, np.int64),
        inputs={
            name: tensors.from_proto(tensor, f"{where}.loss_fn_inputs[{name!r}]", budget=budget)
            for name, tensor in sorted(datum.loss_fn_inputs.items())
        },
    )


def _chunk(chunk: pb.Chunk, where: str) -> Array:
    match chunk.WhichOneof("chunk"):
        case "encoded_text":
            return tensors.tokens_from_bytes(chunk.encoded_text.tokens, where)
        case "image":
            raise InvalidOperationError(f"{where}: {NO_IMAGES}")
        case "dmel":
            raise InvalidOperationError(f"{where}: {NO_AUDIO}")
        case _:
            raise InvalidOperationError(f"{where}: an empty chunk; send encoded_text")
