"""Tokens are drawn from the tempered, truncated distribution, and each row minds its own business."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from worker.sampler.picking import Draw, pick


def make_draw(
    temperature: float = 1.0, top_k: int = -1, top_p: float = 1.0, topk: int = 0, uniform: float = 0.5
) -> Draw:
    """Plain sampling, unless told otherwise."""
    return Draw(temperature, top_k, top_p, topk, uniform)


def make_logits(num_rows: int, vocab_size: int, seed: int = 0) -> Tensor:
    """Random logits, a few of them equal."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_rows, vocab_size, generator=generator) * 3 * 8).round() / 8


def expected_token(logits: npt.NDArray[np.float64], draw: Draw) -> int:
    """By the definition: sort stably, cut, and walk along the probabilities by token id."""
    if draw.temperature == 0:
        return int(np.argmax(logits))
    scaled = logits / draw.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = np.argsort(-logits, kind="stable")
    if draw.top_k > 0:
        probs[order[draw.top_k :]] = 0
    if draw.top_p < 1:
        before = np.cumsum(probs[order]) - probs[order]
        cut = before >= draw.top_p * probs.sum()
        cut[0] = False
        probs[order[cut]] = 0
    cumulative = np.cumsum(probs)
    return int(np.argmax(cumulative > draw.uniform * cumulative[-1]))


@pytest.mark.parametrize("vocab_size", [7, 97, 1500, 5003])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, -1, 1.0),
        (0.0, -1, 1.0),
        (0.6, 5, 1.0),
        (1.0, -1, 0.7),
        (2.0, 40, 0.95),
        (50.0, 1200, 0.9),
        (90.0, 0, 0.99),
    ],
)
def test_a_token_is_the_one_that_the_definition_names(
    vocab_size: int, temperature: float, top_k: int, top_p: float
) -> None:
    # given many rows with random numbers of their own
    logits_NV = make_logits(40, vocab_size)
    numbers = np.random.default_rng(1).random(40)
    draws = [make_draw(temperature, top_k, top_p, uniform=float(number)) for number in numbers]

    # when tokens are picked
    picked = pick(logits_NV, draws)

    # then they are those of a slow implementation in NumPy
    rows = logits_NV.double().numpy()
    assert picked.tokens.tolist() == [expected_token(row, draw) for row, draw in zip(rows, draws, strict=True)]


def test_logprobs_are_those_of_the_tempered_distribution_whatever_the_truncation() -> None:
    # given rows with temperature and truncation
    logits_NV = make_logits(3, 50)
    draws = [make_draw(0.5, 3), make_draw(2.0, -1, 0.5), make_draw(0.0)]

    # when tokens are picked
    picked = pick(logits_NV, draws)

    # then log-probabilities are log softmax(logits / T), at T = 0 of the model itself
    for row, temperature in enumerate((0.5, 2.0, 1.0)):
        expected = torch.log_softmax(logits_NV[row] / temperature, -1)[int(picked.tokens[row])]
        assert picked.logprobs[row] == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("vocab_size", [97, 1500, 4096])
def test_a_row_is_picked_alike_alone_and_in_company(vocab_size: int) -> None:
    # given rows with every kind of option
    options = [(1.0, -1, 1.0), (0.0, -1, 1.0), (0.7, 5, 1.0), (1.0, -1, 0.7), (2.0, 40, 0.95), (60.0, -1, 0.9)]
    logits_NV = make_logits(24, vocab_size)
    draws = [
        make_draw(*options[row % len(options)], topk=row % 4, uniform=(row * 0.37) % 1) for row in range(len(logits_NV))
    ]

    # when all are picked together and each alone
    together = pick(logits_NV, draws)

    # then every number is the same
    for row, draw in enumerate(draws):
        alone = pick(logits_NV[row : row + 1], [draw])
        assert alone.tokens[0] == together.tokens[row]
        assert alone.logprobs[0] == together.logprobs[row]
        assert alone.topk.get(0) == together.topk.get(row)


def test_of_equal_logits_the_lower_ids_are_kept() -> None:
    # given four tokens that are equally likely, of which two may stay
    logits_NV = torch.tensor([[0.0, 2.0, 2.0, 2.0, 2.0]]).repeat(2, 1)

    # when tokens are drawn at both ends of the random numbers
    picked = pick(logits_NV, [make_draw(top_k=2, uniform=0.0), make_draw(top_k=2, uniform=0.999999)])

    # then they are the first two of the four
    assert picked.tokens.tolist() == [1, 2]


def test_a_random_number_just_below_one_gives_a_possible_token() -> None:
    # given a vocabulary that ends with impossible tokens
    logits_NV = torch.tensor([[0.0, 1.0, float("-inf"), float("-inf")]])

    # when the largest random number is used
    picked = pick(logits_NV, [make_draw(uniform=1 - 2**-53)])

    # then the last possible token is drawn
    assert picked.tokens.tolist() == [1]
    assert np.isfinite(picked.logprobs).all()


def test_a_tiny_temperature_is_greedy() -> None:
    # given a temperature at which differences overflow
    logits_NV = make_logits(2, 30) + torch.rand(2, 30)

    # when tokens are drawn
    picked = pick(logits_NV, [make_draw(1e-30, uniform=0.9), make_draw(1e-9, uniform=0.1)])

    # then they are the best ones, with probability one
    assert picked.tokens.tolist() == logits_NV.argmax(-1).tolist()
    assert picked.logprobs.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_without_usable_numbers_are_named_and_disturb_nobody(bad: float) -> None:
    # given a row with a NaN or an infinity between others
    logits_NV = make_logits(3, 40)
    draws = [make_draw(top_p=0.9), make_draw(top_k=3), make_draw()]
    undisturbed = pick(logits_NV, draws)
    logits_NV[1, 7] = bad

    # when tokens are picked
    picked = pick(logits_NV, draws)

    # then that row alone is marked
    assert picked.finite.tolist() == [True, False, True]
    assert picked.tokens[[0, 2]].tolist() == undisturbed.tokens[[0, 2]].tolist()


def test_best_tokens_come_in_order_with_their_logprobs() -> None:
    # given two rows that want different numbers of best tokens, and one that wants none
    logits_NV = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))

    # when tokens are picked
    picked = pick(logits_NV, [make_draw(topk=2), make_draw(), make_draw(0.5, topk=5)])

    # then each has its own, under the distribution its token is drawn from
    best = torch.log_softmax(logits_NV[2] / 0.5, -1).topk(5)
    assert set(picked.topk) == {0, 2}
    assert len(picked.topk[0][0]) == 2
    assert picked.topk[2][0] == best.indices.tolist()
    assert picked.topk[2][1] == pytest.approx(best.values.tolist(), abs=1e-6)
