"""What lies in the cache never shows: with the deterministic setting a prompt gives the same bits cold and warm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jobs.operations import Sample, SampleOutcome
from tests.numerics.test_deterministic import ODD, make_odd
from tests.worker.engine.models import make_base_model
from tests.worker.sampler.requests import (
    assert_identical,
    make_adapter,
    make_prompt,
    make_sample,
    make_sampler,
    run_steps,
    sample_one,
    submit_all,
)
from worker.engine.adapter import Adapter
from worker.engine.base_model import BaseModel
from worker.sampler.blocks import BLOCK_TOKENS
from worker.sampler.reports import Finished
from worker.sampler.sampler import Sampler

MODELS = ("qwen3", "qwen3_moe", *ODD)
NUM_BLOCKS = 7
PROMPT = make_prompt(NUM_BLOCKS * BLOCK_TOKENS + 7)
"""Blocks that can be shared, and a rest; shorter prompts have the same bits however they are cut."""


def make(name: str) -> BaseModel:
    return (
        make_odd(name, max_position_embeddings=512)
        if name in ODD
        else make_base_model(name, max_position_embeddings=512)
    )


def sample(sampler: Sampler, body: Sample, adapter: Adapter | None = None, *, scope: str = "mine") -> Finished:
    """One request among what the sampler is doing, to its end."""
    submit_all(sampler, {"only": (body, adapter)}, scope=scope)
    return run_steps(sampler)[0]["only"]


def outcome_of(finished: Finished) -> SampleOutcome:
    assert isinstance(finished.outcome, SampleOutcome), finished.outcome
    return finished.outcome


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("model", MODELS)
def test_cold_warm_and_filled_by_another_give_the_same_bits(model: str, rank: int | None) -> None:
    # given a request alone with an empty cache
    base_model = make(model)
    adapter = None if rank is None else make_adapter(base_model, rank)
    body = make_sample(PROMPT, num_samples=2, max_tokens=6, topk_sample_logprobs=2)
    cold = sample_one(base_model, body, adapter)
    fillers = {
        "the same": PROMPT,
        "shorter": PROMPT[: 2 * BLOCK_TOKENS + 3],
        "longer": np.concatenate([PROMPT, make_prompt(50)]),
        "whole blocks": PROMPT[: NUM_BLOCKS * BLOCK_TOKENS],
    }
    for how, prompt in fillers.items():
        # when others have filled the cache, in company, and draw on
        sampler = make_sampler(base_model)
        filler = make_sample(prompt, max_tokens=20, seed=9)
        other = make_sample(make_prompt(45, 3), max_tokens=20)
        submit_all(sampler, {"other": (other, None), "filler": (filler, adapter)}, scope="mine")
        for _ in range(3):
            sampler.step()
        warm = sample(sampler, body, adapter)
        # then nothing differs but what is counted
        assert_identical(outcome_of(warm), cold)
        shared = min(len(prompt), NUM_BLOCKS * BLOCK_TOKENS) // BLOCK_TOKENS * BLOCK_TOKENS
        assert (warm.tokens_cached, warm.tokens_prefilled) == (shared, len(PROMPT) - shared), how


@pytest.mark.parametrize("model", ["qwen3", "experts"])
def test_too_small_a_cache_and_other_limits_give_the_same_bits(model: str) -> None:
    # given requests that begin alike, for an adapter and for the base model
    base_model, again = make(model), make(model)
    adapter = make_adapter(base_model, 1)
    wanted: dict[str, tuple[Sample, Adapter | None]] = {}
    for number in range(6):
        prompt = np.concatenate([PROMPT[: 200 + 5 * number], make_prompt(number + 1, number)])
        options: dict[str, Any] = {"prompt_logprobs": True} if number % 3 == 2 else {}
        body = make_sample(prompt, num_samples=1 + number % 2, max_tokens=30, seed=number, **options)
        wanted[str(number)] = (body, adapter if number % 2 else None)
    # when they are sampled alone, where they preempt each other, and by a worker with other limits
    small, other = make_sampler(base_model, kv_tokens_max=320), make_sampler(again, sequences_max=3, tokens_max=40)
    for sampler in (small, other):
        submit_all(sampler, wanted, scope="mine")
    cramped, steps = run_steps(small)
    elsewhere, _ = run_steps(other)
    # then every number is the same, and there was something to be preempted and shared
    for name, (body, of) in wanted.items():
        alone = sample_one(base_model, body, of)
        assert_identical(outcome_of(cramped[name]), alone)
        assert_identical(outcome_of(elsewhere[name]), alone)
        assert cramped[name].tokens_cached + cramped[name].tokens_prefilled == len(body.prompt)
    assert sum(step.overhead for step in steps) > 0
    assert sum(finished.tokens_cached for finished in elsewhere.values()) > 0
    assert small._scheduler._pool.num_free == small._scheduler._pool.num_blocks


@pytest.mark.parametrize("options", [{}, {"prompt_logprobs_last_n": 20}])
def test_a_scored_prompt_is_computed_from_its_first_scored_token_on(options: dict[str, Any]) -> None:
    # given a warm cache
    base_model = make("qwen3")
    sampler = make_sampler(base_model)
    sample(sampler, make_sample(PROMPT))
    # when a request wants its prompt scored, wholly or at its end
    body = make_sample(PROMPT, prompt_logprobs=True, topk_prompt_logprobs=2, **options)
    scored = sample(sampler, body)
    # then the scores are those of an empty cache, and only blocks without scored tokens were taken over
    assert_identical(outcome_of(scored), sample_one(base_model, body))
    first_scored_row = len(PROMPT) - 21 if options else 0
    assert scored.tokens_cached == first_scored_row // BLOCK_TOKENS * BLOCK_TOKENS


def test_scopes_and_adapters_never_share() -> None:
    # given a cache filled for one adapter by one account
    base_model = make("qwen3")
    adapter, other = make_adapter(base_model, 4, 1), make_adapter(base_model, 4, 2)
    sampler = make_sampler(base_model)
    body = make_sample(PROMPT)
    sample(sampler, body, adapter)
    # when it is asked for by another account, with another adapter, without one, and without a scope
    strangers = [sample(sampler, body, adapter, scope="theirs"), sample(sampler, body, other), sample(sampler, body)]
    sampler.submit("unscoped", body, adapter)
    strangers.append(run_steps(sampler)[0]["unscoped"])
    # then nothing is found, and everybody gets what they get alone
    assert [finished.tokens_cached for finished in strangers] == [0, 0, 0, 0]
    for finished, whose in zip(strangers, (adapter, other, None, adapter), strict=True):
        assert_identical(outcome_of(finished), sample_one(base_model, body, whose))
    assert sample(sampler, body, adapter).tokens_cached == NUM_BLOCKS * BLOCK_TOKENS


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    # given sixteen requests that differ in their seed alone
    base_model = make("llama")
    bodies = {str(seed): (make_sample(PROMPT, seed=seed), None) for seed in range(16)}
    sampler = make_sampler(base_model, tokens_max=1024)
    # when they are sampled together
    submit_all(sampler, bodies, scope="mine")
    finished, _ = run_steps(sampler)
    # then the first computes what is common, the others their rest, and each gets what it gets alone
    assert sorted(done.tokens_prefilled for done in finished.values()) == [7] * 15 + [len(PROMPT)]
    assert_identical(outcome_of(finished["7"]), sample_one(base_model, bodies["7"][0]))


def test_a_sequence_preempted_while_drawing_goes_on_with_the_same_bits() -> None:
    # given two sequences that grow to three blocks each, in a cache of four
    base_model = make("qwen3")
    body = make_sample(make_prompt(BLOCK_TOKENS - 1), max_tokens=40)
    sampler = make_sampler(base_model, kv_tokens_max=4 * BLOCK_TOKENS)
    submit_all(sampler, {"older": (body, None), "younger": (body, None)}, scope="mine")
    # when the younger one has to give way
    finished, steps = run_steps(sampler)
    # then both get what they get alone, though one of them had to draw twice
    alone = sample_one(base_model, body)
    for name in ("older", "younger"):
        assert_identical(outcome_of(finished[name]), alone)
    assert sum(step.overhead > 0 for step in steps) > 20
