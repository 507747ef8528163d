"""What a request asks for is what it gets, and what cannot be served fails alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from jobs.operations import Category, Failure, Sample, SampleOutcome
from tests.worker.engine.models import VOCAB_SIZE, make_base_model, make_model
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
from tests.worker.sampler.test_stops import TOKENIZER
from worker.engine.base_model import BaseModel
from worker.sampler.sampler import Sampler


@pytest.fixture(scope="module")
def base_model() -> BaseModel:
    """A tiny model whose end-of-sequence token is 1."""
    return make_base_model("qwen3")


def test_continuations_differ_and_are_the_same_for_the_same_seed(base_model: BaseModel) -> None:
    # given four continuations of one prompt
    body = make_sample(num_samples=4, max_tokens=12, seed=3)

    # when they are sampled twice, and with another seed
    first, again = sample_one(base_model, body), sample_one(base_model, body)
    other = sample_one(base_model, make_sample(num_samples=4, max_tokens=12, seed=4))

    # then the seed decides, and continuations are independent
    assert_identical(first, again)
    texts = [tuple(sequence.tokens) for outcome in (first, other) for sequence in outcome.sequences]
    assert len(set(texts)) == 8


def test_sampling_on_from_a_drawn_token_goes_on_alike(base_model: BaseModel) -> None:
    # given a sequence, and its first three tokens put behind the prompt
    body = make_sample(make_prompt(6), max_tokens=10)
    tokens = sample_one(base_model, body).sequences[0].tokens

    # when sampling goes on from there with the same seed
    longer = make_sample(np.concatenate([make_prompt(6), tokens[:3]]), max_tokens=7)

    # then the rest is the same, as a random number belongs to its position
    assert sample_one(base_model, longer).sequences[0].tokens.tolist() == tokens[3:].tolist()


def test_a_stop_token_ends_a_sequence_and_is_part_of_it(base_model: BaseModel) -> None:
    # given what is drawn when nothing stops
    tokens = sample_one(base_model, make_sample(max_tokens=20)).sequences[0].tokens.tolist()
    stop = tokens[6]
    expected = tokens[: tokens.index(stop) + 1]

    # when one of the tokens is a stop token
    sequence = sample_one(base_model, make_sample(max_tokens=20, stop=(stop,))).sequences[0]

    # then the sequence ends with it
    assert sequence.tokens.tolist() == expected
    assert len(sequence.logprobs) == len(expected)
    assert sequence.stopped


def test_without_stop_the_end_of_sequence_token_ends_and_with_an_empty_one_nothing_does(base_model: BaseModel) -> None:
    # given many continuations at a temperature where every token comes up
    options: dict[str, Any] = {"num_samples": 12, "max_tokens": 20, "temperature": 30.0}

    # when stop is absent, and when it is empty
    absent = sample_one(base_model, make_sample(stop=None, **options)).sequences
    empty = sample_one(base_model, make_sample(stop=(), **options)).sequences

    # then token 1 ends those that have it, or none
    assert any(sequence.stopped for sequence in absent)
    for ended, full in zip(absent, empty, strict=True):
        assert ended.stopped == (1 in full.tokens)
        assert ended.tokens.tolist() == full.tokens.tolist()[: len(ended.tokens)]
        assert (ended.tokens[-1] == 1) == ended.stopped
        assert (len(full.tokens), full.stopped) == (20, False)


def test_a_stop_string_ends_a_sequence_with_the_token_that_completes_it() -> None:
    # given a model over the bytes of a tokenizer, and what it draws when nothing stops
    base_model = make_base_model("llama", vocab_size=len(TOKENIZER.get_vocab()))
    body = make_sample([5, 6, 7], max_tokens=30)
    tokens = sample_one(base_model, body).sequences[0].tokens.tolist()
    string = TOKENIZER.decode(tokens[10:12], skip_special_tokens=False)
    counts = range(1, 31)
    expected = next(n for n in counts if string in TOKENIZER.decode(tokens[:n], skip_special_tokens=False))

    # when two of the tokens together are a stop string
    stopping = make_sample([5, 6, 7], max_tokens=30, stop=("never to be seen", string))
    finished = sample_all(base_model, {"a": (stopping, None)}, TOKENIZER)

    # then the sequence ends there
    outcome = finished["a"].outcome
    assert isinstance(outcome, SampleOutcome)
    assert outcome.sequences[0].tokens.tolist() == tokens[:expected]
    assert outcome.sequences[0].stopped


@pytest.mark.parametrize(
    ("length", "max_tokens", "drawn"), [(10, None, 30), (10, 99, 30), (39, None, 1), (40, None, 1)]
)
def test_the_context_ends_a_sequence(length: int, max_tokens: int | None, drawn: int) -> None:
    # given a context of 40 tokens, and a request that asks for all there is, or more
    base_model = make_base_model("qwen3", max_position_embeddings=40)

    # when it is sampled
    sequence = sample_one(base_model, make_sample(make_prompt(length), max_tokens=max_tokens)).sequences[0]

    # then it ends with the context, for want of room
    assert (len(sequence.tokens), sequence.stopped) == (drawn, False)


def test_prompt_options_shape_the_outcome(base_model: BaseModel) -> None:
    # given a prompt of 9 tokens of which the last 3 are to be scored
    options: dict[str, Any] = {"prompt_logprobs": True, "topk_prompt_logprobs": 2, "max_tokens": 1}
    everything = sample_one(base_model, make_sample(make_prompt(9), **options))

    # when it is sampled with and without the limit
    last = sample_one(base_model, make_sample(make_prompt(9), prompt_logprobs_last_n=3, **options))

    # then the rest is not scored, and what is scored is the same
    assert everything.prompt_logprobs is not None
    assert last.prompt_logprobs is not None
    assert last.topk_prompt_logprobs is not None
    assert np.isnan(everything.prompt_logprobs).tolist() == [True] + [False] * 8
    assert np.isnan(last.prompt_logprobs).tolist() == [True] * 6 + [False] * 3
    np.testing.assert_allclose(last.prompt_logprobs[6:], everything.prompt_logprobs[6:], atol=1e-6, rtol=0)
    assert (last.topk_prompt_logprobs == -99999.0).all(1).tolist() == [True] * 6 + [False] * 3
    assert last.sequences[0].topk_tokens is None
    assert sample_one(base_model, make_sample()).prompt_logprobs is None


def test_best_tokens_are_reported_for_every_drawn_token(base_model: BaseModel) -> None:
    # given greedy sampling with the three best tokens
    body = make_sample(temperature=0.0, topk_sample_logprobs=3, num_samples=2)

    # when it is sampled
    sequence = sample_one(base_model, body).sequences[1]

    # then the best one is the one drawn
    assert sequence.topk_tokens is not None
    assert sequence.topk_logprobs is not None
    assert sequence.topk_tokens.shape == (8, 3)
    assert sequence.topk_tokens[:, 0].tolist() == sequence.tokens.tolist()
    assert sequence.topk_logprobs[:, 0].tolist() == sequence.logprobs.tolist()


def test_a_prompt_in_chunks_scores_as_a_whole_one(base_model: BaseModel) -> None:
    # given a prompt of 100 tokens
    body = make_sample(make_prompt(100), prompt_logprobs=True, temperature=0.0)

    # when it is prefilled at once, and a block a step
    whole, chunked = sample_one(base_model, body), sample_one(base_model, body, tokens_max=16)

    # then it says the same
    assert whole.prompt_logprobs is not None
    assert chunked.prompt_logprobs is not None
    assert_identical(chunked, whole)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_sample([]), "prompt: is empty"),
        (lambda: make_sample(make_prompt(300)), "prompt: has 300 tokens, the model's context holds 256"),
        (lambda: make_sample(make_prompt(100), max_tokens=60), "max_tokens: .* cache of 128 tokens"),
        (lambda: make_sample(make_prompt(129), max_tokens=None), "max_tokens: .* cache of 128 tokens"),
        (lambda: make_sample([3, VOCAB_SIZE]), f"prompt: .* 0 to {VOCAB_SIZE - 1}"),
        (lambda: make_sample([3, -1]), "prompt: .* outside the vocabulary"),
        (lambda: make_sample(max_tokens=0), "max_tokens: must be at least 1"),
        (lambda: make_sample(num_samples=0), "num_samples"),
        (lambda: make_sample(stop=("x",)), "stop: .* without a tokenizer"),
        (lambda: make_sample(topk_sample_logprobs=VOCAB_SIZE + 1), "topk_sample_logprobs: must be between 0"),
        (lambda: make_sample(topk_prompt_logprobs=-1), "topk_prompt_logprobs: must be between 0"),
        (
            lambda: make_sample(make_prompt(3), target_prompt_logprobs=np.full((2, 1), VOCAB_SIZE)),
            "target_prompt_logprobs: .* outside the vocabulary",
        ),
        (
            lambda: make_sample(make_prompt(3), target_prompt_logprobs=np.full((3, 1), 1)),
            "target_prompt_logprobs: must have a row",
        ),
    ],
)
def test_what_cannot_be_served_fails_alone(base_model: BaseModel, make: Callable[[], Sample], words: str) -> None:
    # given a request that cannot be served, and one that can
    good = make_sample()

    # when both are sampled
    finished = sample_all(base_model, {"bad": (make(), None), "good": (good, None)}, kv_tokens_max=128)

    # then the first says what to change, and the second does not notice
    refused, served = finished["bad"].outcome, finished["good"].outcome
    assert isinstance(refused, Failure)
    assert refused.category is Category.USER
    assert re.search(words, refused.error), refused.error
    assert (finished["bad"].tokens_prefilled, finished["bad"].tokens_sampled) == (0, 0)
    assert isinstance(served, SampleOutcome)
    assert_identical(served, sample_one(base_model, good))


@pytest.mark.parametrize("options", [{}, {"prompt_logprobs": True}])
def test_weights_without_usable_numbers_fail_alone_and_poison_no_block(
    base_model: BaseModel, options: dict[str, Any]
) -> None:
    # given an adapter that has diverged, and a cache that is soon used again
    diverged = make_adapter(base_model, 4)
    diverged.flat.fill_(float("nan"))
    good = make_sample(make_prompt(20), num_samples=2, max_tokens=30)
    sampler = make_sampler(base_model, kv_tokens_max=192)
    sampler.submit("bad", make_sample(make_prompt(40), num_samples=3, **options), diverged)
    sampler.submit("good", good, None)
    sampler.submit("later", good, None)

    # when all are sampled
    finished, _ = run_steps(sampler)

    # then the service is to blame for the one, and the others do not notice
    failure = finished["bad"].outcome
    assert isinstance(failure, Failure)
    assert failure.category is Category.SERVER
    assert "NaN or infinity" in failure.error
    for name in ("good", "later"):
        served = finished[name].outcome
        assert isinstance(served, SampleOutcome)
        assert_identical(served, sample_one(base_model, good))


def test_a_cancelled_request_is_forgotten_and_disturbs_nobody(base_model: BaseModel) -> None:
    # given two requests in the middle of drawing, one waiting, and one refused
    sampler = make_sampler(base_model, sequences_max=4)
    body = make_sample(num_samples=2, max_tokens=10)
    for name in ("a", "b", "c"):
        sampler.submit(name, body, None)
    sampler.step()
    sampler.submit("refused", make_sample([]), None)

    # when all but one are cancelled, and one that is not there
    for name in ("a", "c", "refused", "unknown"):
        sampler.cancel(name)

    # then the last one finishes, alone, and holds nothing
    finished, _ = run_steps(sampler)
    assert list(finished) == ["b"]
    outcome = finished["b"].outcome
    assert isinstance(outcome, SampleOutcome)
    assert_identical(outcome, sample_one(base_model, body))
    assert_all_blocks_are_free(sampler)


def test_tokens_are_counted_per_request(base_model: BaseModel) -> None:
    # given three continuations of one prompt
    body = make_sample(make_prompt(7), num_samples=3, max_tokens=5)

    # when they are sampled
    done = sample_all(base_model, {"a": (body, None)})["a"]

    # then the prompt counts once
    assert (done.tokens_prefilled, done.tokens_cached, done.tokens_sampled) == (7, 0, 15)


def test_work_is_counted_once_whatever_is_done_again(base_model: BaseModel) -> None:
    # given requests that have room, and the same in a cache where they preempt each other
    adapter = make_adapter(base_model, 4)
    totals, overheads = [], []
    for kv_tokens_max in (2048, 64):
        sampler = make_sampler(base_model, kv_tokens_max=kv_tokens_max)
        for number in range(3):
            body = make_sample(make_prompt(20 + number), num_samples=2, max_tokens=16)
            sampler.submit(str(number), body, adapter if number else None)

        # when they are sampled
        _, steps = run_steps(sampler)
        totals.append({name: sum(step.work.get(name, 0) for step in steps) for name in "012"})
        overheads.append(sum(step.overhead for step in steps))
        assert all(step.device_ns > 0 for step in steps)
        assert all(step.work or step.overhead for step in steps)
        assert_all_blocks_are_free(sampler)

    # then each pays for its tokens once, an adapter costs something, and the rest is overhead
    assert totals[0]["1"] > totals[0]["0"]
    for name in "012":
        assert totals[1][name] == pytest.approx(totals[0][name], rel=0.01)  # a row of the head more or less
    assert overheads[0] == 0
    assert overheads[1] > 0


def test_an_id_is_used_once_at_a_time(base_model: BaseModel) -> None:
    # given a request
    sampler = make_sampler(base_model)
    sampler.submit("a", make_sample(), None)

    # when another comes under its id; then it is refused until the first is finished
    with pytest.raises(ValueError, match="is being sampled already"):
        sampler.submit("a", make_sample(), None)
    run_steps(sampler)
    sampler.submit("a", make_sample(), None)
    assert sampler.has_work


def test_half_precision_samples_too() -> None:
    # given a base model in bfloat16 with a fp32 adapter
    model = make_model("qwen3").to(torch.bfloat16)
    base_model = BaseModel(model, name="tiny/half", eos_token_ids=(1,))
    body = make_sample(make_prompt(40), num_samples=3, max_tokens=4, prompt_logprobs=True)
    adapter = make_adapter(base_model, 4)

    # when it samples in one chunk and in several; then numbers come out, and the same each time
    for tokens_max in (256, 16):
        outcome = sample_one(base_model, body, adapter, tokens_max=tokens_max)
        assert np.isfinite(outcome.sequences[0].logprobs).all()
        assert_identical(outcome, sample_one(base_model, body, adapter, tokens_max=tokens_max))


def assert_all_blocks_are_free(sampler: Sampler) -> None:
    pool = sampler._scheduler._pool
    assert pool.num_free == pool.num_blocks
