"""Data and settings of `forward` and `forward_backward`, against what each loss needs."""

from __future__ import annotations

import math
from collections.abc import Mapping

from jobs.losses import LOSS_SPECS, LossSpec
from jobs.operations import Array, Datum, ForwardBackward
from jobs.validation.errors import InvalidOperationError
from jobs.validation.models import ModelFacts
from jobs.validation.numbers import check_finite, check_integer, check_tokens

TARGETS_MAX = 1024
"""Targets that one position may have."""

TARGETS = "target_tokens"


def check_forward_backward(body: ForwardBackward, model: ModelFacts) -> None:
    """Refuse data that the loss is not defined on; names the datum."""
    spec = LOSS_SPECS.get(body.loss_fn)
    if spec is None:
        raise InvalidOperationError(f"loss_fn: {body.loss_fn!r} is not one of {', '.join(sorted(LOSS_SPECS))}")
    _check_config(body.loss_config, spec, body.loss_fn)
    if not body.data:
        raise InvalidOperationError("data: is empty; send at least one datum")
    for index, datum in enumerate(body.data):
        _check_datum(datum, spec, body.loss_fn, model, f"data[{index}]")


def _check_config(config: Mapping[str, float | str], spec: LossSpec, loss_fn: str) -> None:
    for key, value in config.items():
        if key not in spec.config:
            allowed = ", ".join(sorted(spec.config)) or "none"
            raise InvalidOperationError(f"loss_fn_config: {key!r} is unknown to {loss_fn}; allowed keys: {allowed}")
        if isinstance(value, str) or not math.isfinite(value):
            raise InvalidOperationError(
                f"loss_fn_config[{key!r}]: {value!r} is not allowed; it must be a finite number"
            )
    settings = {**spec.config, **config}
    low, high = settings.get("clip_low_threshold"), settings.get("clip_high_threshold")
    if isinstance(low, float) and isinstance(high, float) and low > high:
        raise InvalidOperationError(
            f"loss_fn_config: clip_low_threshold {low} is above clip_high_threshold {high}; they bound the ratio"
        )


def _check_datum(datum: Datum, spec: LossSpec, loss_fn: str, model: ModelFacts, where: str) -> None:
    length = len(datum.tokens)
    if length == 0:
        raise InvalidOperationError(f"{where}.model_input: is empty; send at least one token")
    if length > model.context_length:
        raise InvalidOperationError(
            f"{where}.model_input: {length} tokens are over the context limit of {model.context_length} of {model.name}"
        )
    check_tokens(datum.tokens, f"{where}.model_input", model.vocab_size)
    _check_names(datum.inputs, spec, loss_fn, where)
    targets = datum.inputs[TARGETS]
    _check_targets(targets, spec, length, model, f"{where}.loss_fn_inputs['{TARGETS}']")
    for name, values in datum.inputs.items():
        if name != TARGETS:
            _check_floats(values, targets.shape, f"{where}.loss_fn_inputs[{name!r}]")


def _check_names(inputs: Mapping[str, Array], spec: LossSpec, loss_fn: str, where: str) -> None:
    for name in spec.required_inputs:
        if name not in inputs:
            raise InvalidOperationError(f"{where}.loss_fn_inputs: {name!r} is missing; {loss_fn} needs {_needs(spec)}")
    for name in inputs:
        if name not in spec.required_inputs and name not in spec.optional_inputs:
            raise InvalidOperationError(
                f"{where}.loss_fn_inputs: {name!r} is unknown to {loss_fn}; it takes {_needs(spec)}"
            )


def _needs(spec: LossSpec) -> str:
    optional = [f"{name} (optional)" for name in spec.optional_inputs]
    return ", ".join([*spec.required_inputs, *optional])


def _check_targets(targets: Array, spec: LossSpec, length: int, model: ModelFacts, field: str) -> None:
    if targets.dtype.kind != "i":
        raise InvalidOperationError(f"{field}: dtype {targets.dtype} is not allowed; it must be int64")
    forms = f"[{length}] or [{length}, K]" if spec.multi_target else f"[{length}]"
    if targets.shape[:1] != (length,) or targets.ndim > (2 if spec.multi_target else 1):
        raise InvalidOperationError(
            f"{field}: shape {list(targets.shape)} does not fit; it must be {forms}, for {length} tokens of model_input"
        )
    if targets.ndim == 2:
        check_integer(targets.shape[1], f"{field}: number of columns", 1, TARGETS_MAX)
    check_tokens(targets, field, model.vocab_size)


def _check_floats(values: Array, shape: tuple[int, ...], field: str) -> None:
    if values.dtype.kind != "f":
        raise InvalidOperationError(f"{field}: dtype {values.dtype} is not allowed; it must be float32")
    if values.shape != shape:
        raise InvalidOperationError(
            f"{field}: shape {list(values.shape)} does not fit; it must be {list(shape)}, as that of target_tokens"
        )
    check_finite(values, field)
