"""Training requests as the official SDK itself encodes them."""

from __future__ import annotations

from collections.abc import Sequence

import tinker
import torch
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest


def datum(tokens: Sequence[int], **inputs: torch.Tensor | tinker.TensorData) -> tinker.Datum:
    """A sequence whose every next token is a target of weight 1, unless inputs are given."""
    chosen = inputs or {"target_tokens": torch.tensor(tokens[1:]), "weights": torch.ones(len(tokens) - 1)}
    model_input = tokens if inputs else tokens[:-1]
    named = {
        name: value if isinstance(value, tinker.TensorData) else tinker.TensorData.from_torch(value)
        for name, value in chosen.items()
    }
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(list(model_input)), loss_fn_inputs=named)


def forward_backward(
    run: str,
    seq: int,
    data: Sequence[tinker.Datum],
    *,
    loss_fn: str = "cross_entropy",
    forward_only: bool = False,
    **config: float,
) -> bytes:
    """The body of `forward_backward`."""
    given = ForwardBackwardInput(data=list(data), loss_fn=loss_fn, loss_fn_config=config or None)
    message = forward_backward_request_to_proto(
        ForwardBackwardRequest(forward_backward_input=given, model_id=run, seq_id=seq)
    )
    message.forward_only = forward_only
    return message.SerializeToString()
