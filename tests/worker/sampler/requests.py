"""Requests with a default for everything, and running a sampler until it is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from jobs.operations import LoraConfig, Sample, SampleOutcome, SamplingParams
from tests.worker.engine.models import VOCAB_SIZE
from worker.engine.adapter import Adapter
from worker.engine.base_model import BaseModel
from worker.sampler.reports import Finished, SamplerStep
from worker.sampler.sampler import Sampler

Wanted = Mapping[str, tuple[Sample, Adapter | None]]


def make_prompt(length: int, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> Any:
    """Random tokens, int64 `[length]`."""
    return np.random.default_rng([seed, length]).integers(2, vocab_size, length)


def make_sample(prompt: Any = None, *, num_samples: int = 1, **options: Any) -> Sample:
    """A request that never stops by itself unless told to; options of `Sample` and of `SamplingParams`."""
    params = {"max_tokens": 8, "seed": 5, "stop": ()}
    for name in ("max_tokens", "seed", "stop", "temperature", "top_k", "top_p"):
        if name in options:
            params[name] = options.pop(name)
    prompt = make_prompt(5) if prompt is None else np.asarray(prompt)
    return Sample(prompt=prompt, num_samples=num_samples, params=SamplingParams(**params), **options)


def make_adapter(base_model: BaseModel, rank: int, seed: int = 0, **flags: bool) -> Adapter:
    """An adapter that has been trained: B is not zero."""
    lora = LoraConfig(rank=rank, seed=seed, alpha=float(rank), **flags)
    adapter = Adapter.create(base_model.layout(lora), lora, base_model.device)
    generator = torch.Generator().manual_seed(seed)
    for b in adapter.b.values():
        b.copy_(torch.randn(b.shape, generator=generator) * 0.1)
    return adapter


def make_sampler(base_model: BaseModel, tokenizer: Any = None, **limits: int) -> Sampler:
    """A sampler with room for a handful of short requests."""
    limits = {"kv_tokens_max": 2048, "sequences_max": 16, "tokens_max": 256, **limits}
    return Sampler(base_model, tokenizer, **limits)


def run_steps(sampler: Sampler, steps_max: int = 2000) -> tuple[dict[str, Finished], list[SamplerStep]]:
    """Step until nothing is left to do."""
    steps = []
    while sampler.has_work:
        steps.append(sampler.step())
        assert len(steps) < steps_max, "the sampler does not come to an end"
    return {finished.request_id: finished for step in steps for finished in step.finished}, steps


def submit_all(sampler: Sampler, wanted: Wanted, *, scope: str | None = None) -> None:
    """Everything together; with a scope, those of equal adapters share prefixes."""
    for request_id, (body, adapter) in wanted.items():
        sampler.submit(request_id, body, adapter, scope=None if scope is None else f"{scope}/{id(adapter)}")


def sample_all(base_model: BaseModel, wanted: Wanted, tokenizer: Any = None, **limits: int) -> dict[str, Finished]:
    """Everything together in one sampler."""
    sampler = make_sampler(base_model, tokenizer, **limits)
    submit_all(sampler, wanted)
    return run_steps(sampler)[0]


def sample_one(base_model: BaseModel, body: Sample, adapter: Adapter | None = None, **limits: int) -> SampleOutcome:
    """One request by itself; it must not fail."""
    outcome = sample_all(base_model, {"only": (body, adapter)}, **limits)["only"].outcome
    assert isinstance(outcome, SampleOutcome), outcome
    return outcome


def assert_identical(one: SampleOutcome, other: SampleOutcome) -> None:
    """Every number of two outcomes, bit for bit."""
    assert len(one.sequences) == len(other.sequences)
    for left, right in zip(one.sequences, other.sequences, strict=True):
        np.testing.assert_array_equal(left.tokens, right.tokens)
        np.testing.assert_array_equal(left.logprobs, right.logprobs)
        assert left.stopped == right.stopped
        _assert_same(left.topk_tokens, right.topk_tokens)
        _assert_same(left.topk_logprobs, right.topk_logprobs)
    for name in ("prompt_logprobs", "topk_prompt_tokens", "topk_prompt_logprobs", "target_prompt_logprobs"):
        _assert_same(getattr(one, name), getattr(other, name))


def _assert_same(left: Any, right: Any) -> None:
    assert (left is None) == (right is None)
    if left is not None:
        np.testing.assert_array_equal(left, right)
