"""JSON bodies → the operations they ask for: `optim_step`, saves, `asample`, and training as SDK 0.16 sends it.

A seed that the client does not give is drawn here, when the operation is accepted, so that a replay draws the same
tokens and starts from the same weights.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np

from api.wire import bodies, tensors
from api.wire.requests import NO_AUDIO, NO_IMAGES
from jobs.operations import (
    Array,
    Datum,
    ForwardBackward,
    LoraConfig,
    OptimStep,
    Sample,
    SamplingParams,
    SaveExternal,
    SaveForSampler,
    SaveState,
)
from jobs.validation.errors import InvalidOperationError

_SEED_MODULUS = 2**63 - 1
JsonObject = Mapping[str, Any]


def forward_backward(payload: JsonObject, *, forward_only: bool) -> ForwardBackward:
    """Read `forward_backward` or `forward` of SDK 0.16.

    Raises:
        InvalidOperationError: names the field that cannot be read.
    """
    key = "forward_input" if forward_only else "forward_backward_input"
    given = _object(payload.get(key), key)
    budget = tensors.CellBudget()
    return ForwardBackward(
        data=tuple(
            _datum(datum, f"{key}.data[{index}]", budget) for index, datum in enumerate(_list(given, "data", key))
        ),
        loss_fn=_text(given.get("loss_fn"), f"{key}.loss_fn"),
        loss_config=_loss_config(given.get("loss_fn_config") or {}, f"{key}.loss_fn_config"),
        forward_only=forward_only,
    )


def lora_config(body: bodies.Lora) -> LoraConfig:
    """What `create_model` adapts."""
    return LoraConfig(
        rank=body.rank,
        seed=_seed(body.seed),
        train_attn=body.train_attn,
        train_mlp=body.train_mlp,
        train_unembed=body.train_unembed,
    )


def optim_step(payload: JsonObject) -> OptimStep:
    """Read `optim_step`.

    Raises:
        InvalidOperationError: a parameter cannot be read, or belongs to another optimizer than AdamW.
    """
    body = bodies.parse(bodies.OptimStep, payload)
    if body.optimizer_params is not None:
        family = body.optimizer_params.get("type")
        raise InvalidOperationError(f"optimizer_params.type: {family!r} is not supported; send adam_params (adamw)")
    return OptimStep(**body.adam_params.model_dump())


def save_state(payload: JsonObject) -> SaveState:
    """Read `save_weights`."""
    body = bodies.parse(bodies.Save, payload)
    return SaveState(body.path, body.ttl_seconds, body.overwrite, body.user_metadata)


def save_for_sampler(payload: JsonObject) -> SaveForSampler:
    """Read `save_weights_for_sampler`; an `inflight` save is a snapshot, which satisfies its contract."""
    body = bodies.parse(bodies.SaveForSampler, payload)
    if (body.path is None) == (body.sampling_session_seq_id is None):
        raise InvalidOperationError("exactly one of path and sampling_session_seq_id must be given")
    return SaveForSampler(body.path, body.sampling_session_seq_id, body.ttl_seconds, body.user_metadata)


def save_external(payload: JsonObject) -> SaveExternal:
    """Read `save_weights_external`."""
    body = bodies.parse(bodies.SaveExternal, payload)
    if body.age_encryption_recipients:
        raise InvalidOperationError("age_encryption_recipients: encryption is not supported; leave it out")
    return SaveExternal(body.path, body.ttl_seconds)


def sample(payload: JsonObject) -> Sample:
    """Read `asample`.

    Raises:
        InvalidOperationError: names the field that cannot be read or the option that is not supported.
    """
    body = bodies.parse(bodies.Sample, payload)
    if body.prompt_alt_tokens_k:
        raise InvalidOperationError(f"prompt_alt_tokens_k: {body.prompt_alt_tokens_k} is not supported; leave it at 0")
    if body.record_stability_info:
        raise InvalidOperationError("record_stability_info: true is not supported; leave it at false")
    return Sample(
        prompt=_model_input(payload.get("prompt"), "prompt"),
        num_samples=num_samples(payload),
        params=_params(body.sampling_params),
        prompt_logprobs=body.prompt_logprobs,
        prompt_logprobs_last_n=body.prompt_logprobs_last_n,
        topk_prompt_logprobs=body.topk_prompt_logprobs,
        topk_sample_logprobs=body.topk_sample_logprobs,
        target_prompt_logprobs=_targets(payload.get("target_prompt_logprobs")),
    )


def num_samples(payload: JsonObject) -> int:
    """How many sequences `asample` asks for; 1 if it does not say.

    Raises:
        InvalidOperationError: not an integer.
    """
    value = payload.get("num_samples")
    if value is None:
        return 1
    if type(value) is not int:
        raise InvalidOperationError(f"num_samples: must be an integer, got {value!r}")
    return value


def _params(params: bodies.Params) -> SamplingParams:
    return SamplingParams(
        max_tokens=params.max_tokens,
        seed=_seed(params.seed),
        stop=_stop(params.stop),
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
    )


def _stop(stop: str | list[Any] | None) -> tuple[str, ...] | tuple[int, ...] | None:
    if stop is None:
        return None
    if isinstance(stop, str):
        return (stop,)
    if all(type(item) is str for item in stop) or all(type(item) is int for item in stop):
        return tuple(stop)
    raise InvalidOperationError("sampling_params.stop: must be a string, a list of strings or a list of token ids")


def _seed(seed: int | None) -> int:
    return secrets.randbelow(_SEED_MODULUS) if seed is None else seed % _SEED_MODULUS


def _targets(tensor: Any) -> Array | None:
    if tensor is None:
        return None
    where = "target_prompt_logprobs"
    return tensors.from_json(tensor, where, budget=tensors.CellBudget(), fill=-1)


def _datum(datum: Any, where: str, budget: tensors.CellBudget) -> Datum:
    given = _object(datum, where)
    inputs = _object(given.get("loss_fn_inputs"), f"{where}.loss_fn_inputs")
    return Datum(
        tokens=_model_input(given.get("model_input"), f"{where}.model_input"),
        inputs={
            name: tensors.from_json(tensor, f"{where}.loss_fn_inputs[{name!r}]", budget=budget)
            for name, tensor in sorted(inputs.items())
        },
    )


def _model_input(given: Any, where: str) -> Array:
    chunks = _list(_object(given, where), "chunks", where)
    tokens = [_chunk(chunk, f"{where}.chunks[{index}]") for index, chunk in enumerate(chunks)]
    return np.concatenate(tokens) if tokens else np.zeros(0, np.int64)


def _chunk(chunk: Any, where: str) -> Array:
    given = _object(chunk, where)
    if "tokens" in given:
        return tensors.numbers(given["tokens"], "int64", f"{where}.tokens")
    if "dmel" in given:
        raise InvalidOperationError(f"{where}: {NO_AUDIO}")
    if "format" in given:
        raise InvalidOperationError(f"{where}: {NO_IMAGES}")
    raise InvalidOperationError(f"{where}: must have 'tokens', has {sorted(given)}")


def _loss_config(config: Any, where: str) -> dict[str, float | str]:
    checked: dict[str, float | str] = {}
    for key, value in _object(config, where).items():
        if type(value) not in (int, float, str):
            raise InvalidOperationError(f"{where}[{key!r}]: must be a number or a text, got {value!r}")
        checked[key] = value if isinstance(value, str) else float(value)
    return checked


def _object(value: Any, where: str) -> JsonObject:
    if not isinstance(value, Mapping):
        raise InvalidOperationError(f"{where}: must be an object, got {type(value).__name__}")
    return value


def _list(given: JsonObject, key: str, where: str) -> list[Any]:
    value = given.get(key)
    if not isinstance(value, list):
        raise InvalidOperationError(f"{where}.{key}: must be a list, got {type(value).__name__}")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InvalidOperationError(f"{where}: must be a text, got {value!r}")
    return value
