"""Datums, operations and run states for tests: a default for everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from jobs.operations import Array, Datum, ForwardBackward, LoraConfig
from tests.worker.engine.models import VOCAB_SIZE
from worker.engine.base_model import BaseModel
from worker.engine.run_state import RunState
from worker.engine.trainer import Trainer


def make_datum(length: int = 7, *, seed: int = 0, targets: int | None = None, **inputs: Array) -> Datum:
    """Random tokens and targets (`[N]`, or `[N, K]` for `targets=K`), and the other inputs as given."""
    draw = np.random.default_rng([seed, length])
    shape = (length,) if targets is None else (length, targets)
    tokens = draw.integers(VOCAB_SIZE, size=length)
    return Datum(tokens, {"target_tokens": draw.integers(VOCAB_SIZE, size=shape), **inputs})


def make_policy_datum(length: int = 7, *, seed: int = 0) -> Datum:
    """A datum for the losses of reinforcement learning; some advantages are 0, as in a prompt."""
    draw = np.random.default_rng([seed, length, 1])
    advantages = draw.normal(size=length).astype(np.float32)
    advantages[: length // 3] = 0
    sampled = (-np.log(VOCAB_SIZE) + draw.normal(size=length)).astype(np.float32)
    return make_datum(length, seed=seed, logprobs=sampled, advantages=advantages)


def make_weights(datum: Datum, *, seed: int = 0) -> Datum:
    """The same datum with random weights, negative ones too."""
    targets = datum.inputs["target_tokens"]
    weights = np.random.default_rng([seed, 2]).normal(size=targets.shape).astype(np.float32)
    return Datum(datum.tokens, {**datum.inputs, "weights": weights})


def make_operation(
    lengths: Sequence[int] = (7, 12),
    *,
    loss_fn: str = "cross_entropy",
    seed: int = 0,
    forward_only: bool = False,
    loss_config: Mapping[str, float | str] | None = None,
) -> ForwardBackward:
    """An operation with one datum per length."""
    make = make_datum if loss_fn == "cross_entropy" else make_policy_datum
    data = tuple(make(length, seed=seed + i) for i, length in enumerate(lengths))
    if loss_fn == "cross_entropy":
        data = tuple(make_weights(datum, seed=seed + i) for i, datum in enumerate(data))
    return ForwardBackward(data, loss_fn, loss_config or {}, forward_only)


def make_state(base_model: BaseModel, lora: LoraConfig | None = None, *, noise: float = 0.05) -> RunState:
    """A run whose B is not zero, as if it had been trained."""
    lora = lora or LoraConfig(rank=4)
    state = RunState.create(base_model, lora)
    generator = torch.Generator().manual_seed(lora.seed + 1)
    state.adapter.flat.add_(torch.randn(state.adapter.flat.shape, generator=generator) * noise)
    return state


def make_trainer(base_model: BaseModel, *, tokens_max: int = 512, logprobs_chunk: int = 16) -> Trainer:
    """A trainer whose chunks are small enough that tests have several."""
    return Trainer(base_model, tokens_max=tokens_max, logprobs_chunk=logprobs_chunk)
