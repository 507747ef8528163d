"""Additions are asked and graded as in the cookbook's arithmetic recipe."""

import random

import pytest

from worker.starter import arithmetic


def test_question_follows_one_solved_example() -> None:
    # Source of the wording: tinker_cookbook 0.6.1, recipes/math_rl/arithmetic_env.py.
    assert [turn["content"] for turn in arithmetic.messages((12, 100))] == [
        "What is 4 + 5?",
        "9",
        "What is 12 + 100?",
    ]


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("112", True),
        ("It is 112.", True),
        ("12 + 100 = 112", True),
        ("1,12", True),
        ("112 or 113", False),
        ("-112", False),
        ("a hundred", False),
        ("", False),
    ],
)
def test_last_whole_number_of_the_reply_counts(reply: str, right: bool) -> None:
    assert arithmetic.is_right(reply, (12, 100)) is right


def test_held_out_pairs_are_never_trained_on() -> None:
    # when all pairs are cut in two
    train, held_out = arithmetic.split_pairs(100)
    # then nothing is in both and nothing is lost
    assert len(held_out) == 100
    assert len(set(train) | set(held_out)) == len(train) + 100 == 101 * 101


def test_a_slip_is_a_whole_number_close_to_the_sum_and_never_right() -> None:
    # given sums at the edge and elsewhere
    rng = random.Random(0)
    for pair in [(0, 0), (0, 1), (50, 50), (100, 100)]:
        # when the answer is slipped many times
        replies = {arithmetic.slip(pair, rng) for _ in range(50)}
        # then it is never right, never negative and never far
        assert not any(arithmetic.is_right(reply, pair) for reply in replies)
        assert all(0 <= int(reply) <= sum(pair) + 10 for reply in replies)
