"""Bad operations are refused in words that name the field, the value and what is allowed; good ones pass."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from jobs.operations import (
    Body,
    Category,
    CreateModel,
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
from jobs.validation import InvalidOperationError, ModelFacts, check
from jobs.validation.models import check_optimizer

MODEL = ModelFacts("tiny", vocab_size=100, context_length=8)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def floats(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def datum(**changes: Any) -> Datum:
    """A datum of `cross_entropy` with 3 tokens."""
    inputs = {"target_tokens": ints(2, 3, 4), "weights": floats(0, 1, -0.5)}
    tokens = changes.pop("tokens", ints(1, 2, 3))
    inputs.update(changes)
    return Datum(tokens, {name: values for name, values in inputs.items() if values is not None})


def training(*data: Datum, loss_fn: str = "cross_entropy", **config: float | str) -> ForwardBackward:
    return ForwardBackward(data or (datum(),), loss_fn, config)


def policy(loss_fn: str, **config: float) -> ForwardBackward:
    """A datum of a reinforcement-learning loss."""
    advantages = datum(weights=None, logprobs=floats(-1, -2, -3), advantages=floats(1, 1, 1))
    return training(advantages, loss_fn=loss_fn, **config)


def sample(*prompt: int, **changes: Any) -> Sample:
    params = {key: changes.pop(key) for key in list(changes) if key in SamplingParams.__dataclass_fields__}
    return Sample(ints(*(prompt or (1, 2, 3))), params=SamplingParams(**params), **changes)


@pytest.mark.parametrize(
    "body",
    [
        CreateModel("tiny", LoraConfig()),
        training(),
        training(datum(target_tokens=ints(1, 2, 3, 4, 5, 6).reshape(3, 2), weights=floats(*[0] * 6).reshape(3, 2))),
        policy("importance_sampling"),
        policy("ppo", clip_low_threshold=0.9),
        policy("cispo"),
        policy("dro", beta=0.1),
        OptimStep(learning_rate=0.0),
        SaveState("0001", ttl_s=3600, user_metadata={"note": "x"}),
        SaveForSampler(sampling_session_seq=0),
        SaveExternal("a.b-c_d"),
        sample(),
        sample(max_tokens=1, stop=("a", "b"), temperature=0.0, top_k=5, top_p=0.5),
        sample(stop=()),
        sample(stop=(1, 99)),
        sample(*range(8), prompt_logprobs=True, prompt_logprobs_last_n=7, topk_prompt_logprobs=20),
        sample(target_prompt_logprobs=ints(-1, 5).reshape(2, 1)),
    ],
)
def test_good_operations_pass(body: Body) -> None:
    check(body, MODEL)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        # models
        (CreateModel("tiny", LoraConfig(rank=0)), ["lora_config.rank", "0", "from 1 to 256"]),
        (CreateModel("tiny", LoraConfig(rank=257)), ["lora_config.rank", "257"]),
        (CreateModel("tiny", LoraConfig(train_attn=False, train_mlp=False, train_unembed=False)), ["at least one"]),
        # losses
        (training(loss_fn="crossentropy"), ["loss_fn", "'crossentropy'", "cross_entropy", "ppo"]),
        (training(loss_fn="cross_entropy", beta=1.0), ["loss_fn_config", "'beta'", "cross_entropy"]),
        (policy("ppo", beta=1.0), ["loss_fn_config", "'beta'", "clip_low_threshold"]),
        (policy("ppo", clip_low_threshold=math.nan), ["clip_low_threshold", "nan", "finite"]),
        (policy("ppo", clip_low_threshold=2.0), ["clip_low_threshold", "2.0", "above", "1.2"]),
        # data
        (ForwardBackward((), "cross_entropy"), ["data", "empty"]),
        (training(datum(), datum(tokens=ints())), ["data[1].model_input", "empty"]),
        (training(datum(tokens=ints(*range(9)))), ["data[0].model_input", "9 tokens", "context limit of 8"]),
        (training(datum(tokens=ints(1, 100, 3))), ["data[0].model_input[1]", "100", "0 to 99"]),
        (training(datum(tokens=ints(1, 2, -1))), ["data[0].model_input[2]", "-1"]),
        (training(datum(target_tokens=None)), ["data[0].loss_fn_inputs", "'target_tokens'", "missing"]),
        (training(datum(), loss_fn="ppo"), ["'logprobs'", "missing", "ppo", "advantages"]),
        (training(datum(mask=floats(1, 1, 1))), ["'mask'", "unknown", "target_tokens"]),
        (training(datum(target_tokens=floats(1, 2, 3))), ["target_tokens", "float32", "int64"]),
        (training(datum(target_tokens=ints(1, 2))), ["target_tokens", "[2]", "[3]"]),
        (training(datum(target_tokens=ints(1, 2, 300))), ["target_tokens", "[2]", "300", "0 to 99"]),
        (training(datum(target_tokens=np.zeros((3, 0), np.int64), weights=None)), []),
        (training(datum(weights=ints(1, 1, 1))), ["weights", "int64", "float32"]),
        (training(datum(weights=floats(1, 1))), ["weights", "[2]", "[3]"]),
        (training(datum(weights=floats(1, math.inf, 1))), ["weights", "[1]", "inf", "finite"]),
        # steps
        (OptimStep(learning_rate=math.nan), ["adam_params.learning_rate", "nan"]),
        (OptimStep(learning_rate=-1e-4), ["adam_params.learning_rate", "-0.0001", "at least 0"]),
        (OptimStep(learning_rate=math.inf), ["learning_rate", "inf"]),
        (OptimStep(beta1=1.0), ["adam_params.beta1", "1.0", "below 1"]),
        (OptimStep(beta2=-0.1), ["adam_params.beta2"]),
        (OptimStep(eps=math.nan), ["adam_params.eps"]),
        (OptimStep(weight_decay=-1.0), ["adam_params.weight_decay"]),
        (OptimStep(grad_clip_norm=-1.0), ["adam_params.grad_clip_norm"]),
        # checkpoints
        (SaveState("a/b"), ["path", "'a/b'", "checkpoint name"]),
        (SaveState(""), ["path"]),
        (SaveState(".."), ["path"]),
        (SaveState("x" * 129), ["path", "128"]),
        (SaveForSampler("naïve"), ["path"]),
        (SaveExternal("a b"), ["path"]),
        (SaveState("a", ttl_s=3599), ["ttl_seconds", "3599", "3600"]),
        (SaveState("a", ttl_s=10**9), ["ttl_seconds"]),
        (SaveState("a", user_metadata={"k": "v" * 2000}), ["user_metadata", "1024"]),
        # samples
        (dataclasses.replace(sample(), prompt=ints()), ["prompt", "empty"]),
        (sample(*range(9)), ["prompt", "9 tokens", "8"]),
        (sample(1, 100), ["prompt[1]", "100", "0 to 99"]),
        (sample(num_samples=0), ["num_samples", "0", "from 1 to 1024"]),
        (sample(max_tokens=0), ["sampling_params.max_tokens", "0"]),
        (sample(temperature=-1.0), ["sampling_params.temperature", "-1.0"]),
        (sample(temperature=math.nan), ["temperature", "nan"]),
        (sample(top_p=0.0), ["sampling_params.top_p", "0.0"]),
        (sample(top_p=1.5), ["top_p", "1.5"]),
        (sample(top_k=0), ["sampling_params.top_k", "0"]),
        (sample(stop=("",)), ["sampling_params.stop[0]"]),
        (sample(stop=(100,)), ["stop[0]", "100", "0 to 99"]),
        (sample(stop=("a",) * 65), ["stop", "65"]),
        (sample(prompt_logprobs_last_n=1), ["prompt_logprobs_last_n", "prompt_logprobs"]),
        (sample(prompt_logprobs=True, prompt_logprobs_last_n=3), ["prompt_logprobs_last_n", "3", "from 1 to 2"]),
        (sample(1, prompt_logprobs=True, prompt_logprobs_last_n=1), ["at least 2 tokens"]),
        (sample(topk_prompt_logprobs=21), ["topk_prompt_logprobs", "21", "20"]),
        (sample(topk_sample_logprobs=-1), ["topk_sample_logprobs", "-1"]),
        (sample(target_prompt_logprobs=ints(1, 2)), ["target_prompt_logprobs", "[2, K]"]),
        (sample(target_prompt_logprobs=floats(1, 2).reshape(2, 1)), ["target_prompt_logprobs", "int64"]),
        (sample(target_prompt_logprobs=ints(1, -2).reshape(2, 1)), ["target_prompt_logprobs[1, 0]", "-2"]),
    ],
)
def test_bad_operations_are_refused_by_field_value_and_allowed_values(body: Body, words: list[str]) -> None:
    with pytest.raises(InvalidOperationError) as refused:
        check(body, MODEL)
    message = str(refused.value)
    assert [word for word in words if word not in message] == []
    assert refused.value.failure.category is Category.USER


def test_only_the_served_optimizer_is_accepted() -> None:
    check_optimizer("adamw")
    with pytest.raises(InvalidOperationError, match="'dimuon' is not supported"):
        check_optimizer("dimuon")
