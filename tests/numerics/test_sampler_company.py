"""Company changes nothing: on CPU a sequence has the same tokens and log-probabilities bit for bit, alone or not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jobs.operations import Sample, SampleOutcome
from tests.worker.engine.models import ARCHITECTURES, VOCAB_SIZE, make_base_model
from tests.worker.sampler.requests import (
    assert_identical,
    make_adapter,
    make_prompt,
    make_sample,
    make_sampler,
    run_steps,
    sample_all,
    sample_one,
)
from worker.engine.adapter import Adapter
from worker.engine.base_model import BaseModel

pytestmark = pytest.mark.parametrize("architecture", ARCHITECTURES)


def make_mixture(base_model: BaseModel) -> dict[str, tuple[Sample, Adapter | None]]:
    """Requests that differ in everything: adapters and ranks, lengths, options."""
    adapters = [None, make_adapter(base_model, 4, 1), make_adapter(base_model, 16, 2, train_unembed=False)]
    adapters.append(make_adapter(base_model, 1, 3))
    wanted: dict[str, tuple[Sample, Adapter | None]] = {}
    options: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0, "topk_sample_logprobs": 3},
        {"temperature": 0.7, "top_k": 11, "num_samples": 3},
        {"top_p": 0.8, "prompt_logprobs": True, "topk_prompt_logprobs": 2},
        {"temperature": 1.3, "num_samples": 5, "max_tokens": 12},
        {"stop": None, "max_tokens": 20, "prompt_logprobs": True},
    ]
    for number, length in enumerate((1, 3, 2, 30, 61, 17, 32, 5)):
        body = make_sample(make_prompt(length, number), seed=number, **options[number % len(options)])
        wanted[f"r{number}"] = (body, adapters[number % len(adapters)])
    return wanted


def test_sampled_together_equals_sampled_alone(architecture: str) -> None:
    # given many requests of several adapters and of the base model
    base_model = make_base_model(architecture)
    wanted = make_mixture(base_model)

    # when they are sampled together, and each alone
    together = sample_all(base_model, wanted)

    # then every number is the same
    for request_id, (body, adapter) in wanted.items():
        outcome = together[request_id].outcome
        assert isinstance(outcome, SampleOutcome)
        assert_identical(outcome, sample_one(base_model, body, adapter))


def test_arriving_late_among_others_changes_nothing(architecture: str) -> None:
    # given a sampler in the middle of other requests
    base_model = make_base_model(architecture)
    wanted = make_mixture(base_model)
    sampler = make_sampler(base_model)
    finished = {}
    for request_id, (body, adapter) in wanted.items():
        sampler.submit(request_id, body, adapter)
        for step in (sampler.step(), sampler.step()):
            finished.update({done.request_id: done for done in step.finished})

    # when all have been served
    finished.update(run_steps(sampler)[0])

    # then they got what they get together from the start
    for request_id, done in sample_all(base_model, wanted).items():
        one, other = done.outcome, finished[request_id].outcome
        assert isinstance(one, SampleOutcome)
        assert isinstance(other, SampleOutcome)
        assert_identical(one, other)


@pytest.mark.parametrize(
    "limits",
    [
        {"kv_tokens_max": 128},
        {"kv_tokens_max": 192, "sequences_max": 3},
    ],
)
def test_too_little_room_delays_and_changes_nothing(architecture: str, limits: dict[str, int]) -> None:
    # given a cache or seats for a few sequences only
    base_model = make_base_model(architecture)
    wanted = make_mixture(base_model)

    # when more wants to be sampled
    cramped = sample_all(base_model, wanted, **limits)

    # then sequences wait or start over, and every number is the same
    for request_id, done in sample_all(base_model, wanted).items():
        one, other = done.outcome, cramped[request_id].outcome
        assert isinstance(one, SampleOutcome)
        assert isinstance(other, SampleOutcome)
        assert_identical(one, other)


def test_the_adapter_matters(architecture: str) -> None:
    # given one prompt, with an adapter and without
    base_model = make_base_model(architecture)
    body = make_sample(make_prompt(20), temperature=0.0, max_tokens=20, prompt_logprobs=True)

    # when both are sampled
    plain, adapted = sample_one(base_model, body), sample_one(base_model, body, make_adapter(base_model, 8))

    # then they differ, so that the tests above compare something
    assert plain.prompt_logprobs is not None
    assert adapted.prompt_logprobs is not None
    assert np.abs(plain.prompt_logprobs[1:] - adapted.prompt_logprobs[1:]).max() > 1e-3
    assert plain.sequences[0].tokens.max() < VOCAB_SIZE
