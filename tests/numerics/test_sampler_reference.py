"""The sampler computes what `model.generate` and the trainer compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from jobs.operations import Datum, ForwardBackward, ForwardBackwardOutcome, LoraConfig, Sample, SampleOutcome
from tests.worker.engine.factories import make_state, make_trainer
from tests.worker.engine.models import ARCHITECTURES, make_base_model, make_model
from tests.worker.sampler.requests import make_prompt, make_sample, sample_all
from worker.engine.base_model import BaseModel
from worker.engine.run_state import RunState
from worker.engine.trainer import TrainRequest

pytestmark = pytest.mark.parametrize("architecture", ARCHITECTURES)


def trainer_logprobs(base_model: BaseModel, state: RunState, tokens: Any) -> Any:
    """What the trainer says of each token but the first, float32 `[N - 1]`."""
    tokens = np.asarray(tokens, dtype=np.int64)
    body = ForwardBackward((Datum(tokens[:-1], {"target_tokens": tokens[1:]}),), "cross_entropy", forward_only=True)
    outcome = make_trainer(base_model).run([TrainRequest(state, body)]).outcomes[0]
    assert isinstance(outcome, ForwardBackwardOutcome), outcome
    return outcome.logprobs[0]


def test_greedy_sampling_equals_generate(architecture: str) -> None:
    # given prompts around the size of a block, and what transformers itself generates
    model = make_model(architecture)
    prompts = [make_prompt(length) for length in (1, 6, 31, 40)]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = [
        model.generate(torch.tensor(prompt)[None], **options, eos_token_id=None)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]

    # when they are sampled together at temperature 0, twice each
    base_model = make_base_model(architecture)
    bodies = [make_sample(prompt, num_samples=2, temperature=0.0, max_tokens=12) for prompt in prompts]
    finished = sample_all(base_model, {str(number): (body, None) for number, body in enumerate(bodies)})

    # then they say the same
    for number, tokens in enumerate(expected):
        outcome = finished[str(number)].outcome
        assert isinstance(outcome, SampleOutcome)
        assert [sequence.tokens.tolist() for sequence in outcome.sequences] == [tokens, tokens]


def test_logprobs_equal_the_trainers(architecture: str) -> None:
    # given runs of several ranks, and requests that want to know everything
    base_model = make_base_model(architecture)
    states = [make_state(base_model, LoraConfig(rank=rank, seed=rank), noise=0.1) for rank in (2, 8)]
    wanted: dict[str, tuple[Sample, Any]] = {}
    for number, length in enumerate((3, 30, 45)):
        targets = np.stack([make_prompt(length - 1, 7), np.full(length - 1, -1)], axis=1)
        body = make_sample(
            make_prompt(length),
            num_samples=2,
            seed=number,
            prompt_logprobs=True,
            target_prompt_logprobs=targets,
            topk_prompt_logprobs=96,
        )
        wanted[str(number)] = (body, states[number % 2].adapter)

    # when they are sampled together
    finished = sample_all(base_model, wanted)

    # then the trainer says the same of every token, in the prompt and behind it
    for number, (body, _) in enumerate(wanted.values()):
        outcome, state, num_prompt = finished[str(number)].outcome, states[number % 2], len(body.prompt)
        assert isinstance(outcome, SampleOutcome)
        assert outcome.prompt_logprobs is not None
        for sequence in outcome.sequences:
            expected = trainer_logprobs(base_model, state, np.concatenate([body.prompt, sequence.tokens]))
            np.testing.assert_allclose(sequence.logprobs, expected[num_prompt - 1 :], rtol=0, atol=1e-5)
            np.testing.assert_allclose(outcome.prompt_logprobs[1:], expected[: num_prompt - 1], rtol=0, atol=1e-5)
        assert np.isnan(outcome.prompt_logprobs[0])
        _check_targets_against_all_tokens(outcome, body)


def _check_targets_against_all_tokens(outcome: SampleOutcome, body: Sample) -> None:
    """With as many best tokens as there are tokens, every target is among them."""
    assert outcome.topk_prompt_tokens is not None
    assert outcome.topk_prompt_logprobs is not None
    assert outcome.target_prompt_logprobs is not None
    assert body.target_prompt_logprobs is not None
    for row, target in enumerate(body.target_prompt_logprobs[:, 0]):
        place = outcome.topk_prompt_tokens[row + 1].tolist().index(target)
        assert outcome.topk_prompt_logprobs[row + 1, place] == outcome.target_prompt_logprobs[row, 0]
    assert not outcome.target_prompt_logprobs[:, 1].any()
    assert (np.diff(outcome.topk_prompt_logprobs[1:], axis=1) <= 0).all()
    assert (outcome.topk_prompt_logprobs[0] == -99999.0).all()


def test_training_goes_on_after_sampling_on_the_same_model(architecture: str) -> None:
    # given a model that has sampled first, so that whatever it caches was made without gradients
    base_model = make_base_model(architecture)
    state = make_state(base_model)
    sample_all(base_model, {"first": (make_sample(), state.adapter)})

    # when a run is trained on it
    tokens = make_prompt(9)
    body = ForwardBackward((Datum(tokens[:-1], {"target_tokens": tokens[1:]}),), "cross_entropy")
    outcome = make_trainer(base_model).run([TrainRequest(state, body)]).outcomes[0]

    # then it works and gradients flow
    assert isinstance(outcome, ForwardBackwardOutcome), outcome
    assert state.gradients.flat.abs().max() > 0
