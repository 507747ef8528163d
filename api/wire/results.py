"""Outcomes of forward, forward-backward and sampling → protobuf, for clients that accept it."""

from __future__ import annotations

import itertools

import numpy as np

from api import tinker_public_pb2 as pb
from jobs.operations import Array, ForwardBackwardOutcome, SampledSequence, SampleOutcome

MEDIA_TYPE = "application/x-protobuf"
RECORD_NAME = "ArrayRecord"


def forward_backward(outcome: ForwardBackwardOutcome) -> bytes:
    """A `ForwardBackwardOutput`: field `logprobs` of every datum, in the order of the request, and the metrics.

    A record holds neighbouring datums of equal trailing shape, so a request that mixes `[N]` and `[N, K]` targets gets
    several records, which the client concatenates.
    """
    message = pb.ForwardBackwardOutput(loss_fn_output_type=RECORD_NAME, metrics=dict(outcome.metrics))
    for trailing_shape, group in itertools.groupby(outcome.logprobs, key=lambda array: array.shape[1:]):
        _add_record(message, trailing_shape, list(group))
    return message.SerializeToString()


def sample(outcome: SampleOutcome) -> bytes:
    """A `SampleResponse`."""
    message = pb.SampleResponse(
        sequences=[_sequence(sequence) for sequence in outcome.sequences],
        prompt_cache_hit_tokens=outcome.prompt_cache_hit_tokens,
    )
    if outcome.prompt_logprobs is not None:
        message.prompt_logprobs = _bytes(outcome.prompt_logprobs, "<f4")
    if outcome.topk_prompt_tokens is not None and outcome.topk_prompt_logprobs is not None:
        message.topk_prompt_logprobs.CopyFrom(_topk(outcome.topk_prompt_tokens, outcome.topk_prompt_logprobs))
    if outcome.target_prompt_logprobs is not None:
        message.target_prompt_logprobs.CopyFrom(_tensor(outcome.target_prompt_logprobs))
    return message.SerializeToString()


def _add_record(message: pb.ForwardBackwardOutput, trailing_shape: tuple[int, ...], arrays: list[Array]) -> None:
    record = message.loss_fn_outputs.add(type_tag=RECORD_NAME, num_datums=len(arrays))
    data = [_bytes(array, "<f4") for array in arrays]
    record.fields["logprobs"].CopyFrom(
        pb.BatchedTensor(
            data=b"".join(data),
            offsets=_bytes(np.cumsum([0, *map(len, data)]), "<i8"),
            dtype=pb.DTYPE_FLOAT32,
            trailing_shape=trailing_shape,
        )
    )


def _sequence(sequence: SampledSequence) -> pb.SampledSequence:
    message = pb.SampledSequence(
        stop_reason=pb.STOP_REASON_STOP if sequence.stopped else pb.STOP_REASON_LENGTH,
        tokens=_bytes(sequence.tokens, "<i4"),
        logprobs=_bytes(sequence.logprobs, "<f4"),
    )
    if sequence.topk_tokens is not None and sequence.topk_logprobs is not None:
        message.topk_sampled_logprobs.CopyFrom(_topk(sequence.topk_tokens, sequence.topk_logprobs))
    return message


def _topk(tokens: Array, logprobs: Array) -> pb.TopkLogprobs:
    length, k = tokens.shape
    return pb.TopkLogprobs(token_ids=_bytes(tokens, "<i4"), logprobs=_bytes(logprobs, "<f4"), k=k, length=length)


def _tensor(array: Array) -> pb.Tensor:
    return pb.Tensor(dense=_bytes(array, "<f4"), dtype=pb.DTYPE_FLOAT32, shape=array.shape)


def _bytes(array: Array, dtype: str) -> bytes:
    return np.ascontiguousarray(array).astype(dtype, copy=False).tobytes()
