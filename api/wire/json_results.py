"""Outcomes → JSON: results that are always JSON, and those of training and sampling for SDK 0.16.

What always holds: no NaN and no infinity as a JSON literal (the client's parser refuses the whole result); they travel
as strings, which it reads as numbers, or as null where the protocol says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from api.wire.results import RECORD_NAME
from jobs.operations import (
    Array,
    Failure,
    ForwardBackwardOutcome,
    Kind,
    Loaded,
    ModelCreated,
    OptimStepOutcome,
    Outcome,
    SampledSequence,
    SampleOutcome,
    Saved,
)

NO_TOKEN_LOGPROB = -99999.0
"""Marks a cell of a top-k table that holds nothing."""

_SAVE_TYPES = {
    Kind.SAVE_STATE: "save_weights",
    Kind.SAVE_FOR_SAMPLER: "save_weights_for_sampler",
    Kind.SAVE_EXTERNAL: "save_weights_external",
}


def result(kind: Kind, outcome: Outcome) -> dict[str, Any]:
    """The JSON object that resolves a future.

    Args:
        kind: of the operation; the same outcome has another `type` for each kind of save.
        outcome: what it resolved to.
    """
    match outcome:
        case Failure():
            return {"error": outcome.error, "category": str(outcome.category)}
        case ModelCreated():
            return {"model_id": outcome.run_id, "type": "create_model"}
        case ForwardBackwardOutcome():
            return _forward_backward(outcome)
        case OptimStepOutcome():
            return {"metrics": metrics(outcome.metrics)}
        case Saved():
            return _without_none(
                type=_SAVE_TYPES[kind],
                path=outcome.path,
                sampling_session_id=outcome.sampling_session_id,
                size_bytes=outcome.size_bytes if kind is Kind.SAVE_EXTERNAL else None,
            )
        case Loaded():
            return {"path": outcome.path, "model_id": outcome.run_id, "type": "load_weights"}
        case SampleOutcome():
            return _sample(outcome)


def metrics(values: Mapping[str, float]) -> dict[str, float | str]:
    """Metrics with non-finite numbers as `"NaN"`, `"Infinity"` and `"-Infinity"`."""
    return {key: number(value) for key, value in values.items()}


def number(value: float) -> float | str:
    """A number that JSON can carry, or its name."""
    if math.isfinite(value):
        return float(value)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _forward_backward(outcome: ForwardBackwardOutcome) -> dict[str, Any]:
    return {
        "loss_fn_output_type": RECORD_NAME,
        "loss_fn_outputs": [{"logprobs": _tensor(array)} for array in outcome.logprobs],
        "metrics": metrics(outcome.metrics),
    }


def _sample(outcome: SampleOutcome) -> dict[str, Any]:
    prompt = outcome.prompt_logprobs
    return _without_none(
        type="sample",
        sequences=[_sequence(sequence) for sequence in outcome.sequences],
        prompt_logprobs=None if prompt is None else [None if math.isnan(x) else number(x) for x in prompt.tolist()],
        topk_prompt_logprobs=_topk(outcome.topk_prompt_tokens, outcome.topk_prompt_logprobs),
        prompt_cache_hit_tokens=outcome.prompt_cache_hit_tokens,
    )


def _sequence(sequence: SampledSequence) -> dict[str, Any]:
    return {
        "stop_reason": "stop" if sequence.stopped else "length",
        "tokens": sequence.tokens.tolist(),
        "logprobs": [number(value) for value in sequence.logprobs.tolist()],
    }


def _topk(tokens: Array | None, logprobs: Array | None) -> list[list[list[Any]] | None] | None:
    if tokens is None or logprobs is None:
        return None
    rows = zip(tokens.tolist(), logprobs.tolist(), strict=True)
    return [_topk_row(ids, values) or None for ids, values in rows]


def _topk_row(tokens: list[int], logprobs: list[float]) -> list[list[Any]]:
    pairs = zip(tokens, logprobs, strict=True)
    return [[token, number(logprob)] for token, logprob in pairs if logprob != NO_TOKEN_LOGPROB]


def _tensor(array: Array) -> dict[str, Any]:
    data = [number(value) for value in array.ravel().tolist()]
    return {"data": data, "dtype": "float32", "shape": list(array.shape)}


def _without_none(**fields: Any) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}
