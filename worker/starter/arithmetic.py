"""Additions in the form that the arithmetic recipe of tinker-cookbook asks and grades them.

Operands run from 0 to 100. The prompt is one solved example followed by the question; the answer is the last whole
number in the reply.
"""

from __future__ import annotations

import random
import re

from worker.starter.corpus import Message

OPERAND_MAX = 100
ANSWER_TOKENS_MAX = 5
_SLIPS = (-10, -2, -1, 1, 2, 10)
_WHOLE_NUMBER = re.compile(r"-?\d+")

Pair = tuple[int, int]
"""The two operands of an addition."""


def question(pair: Pair) -> str:
    """The addition as a user asks it."""
    return f"What is {pair[0]} + {pair[1]}?"


def answer(pair: Pair) -> str:
    """The right reply."""
    return str(pair[0] + pair[1])


def slip(pair: Pair, rng: random.Random) -> str:
    """A wrong reply that is close to the right one, as somebody gives who adds too fast."""
    off = rng.choice([off for off in _SLIPS if sum(pair) + off >= 0])
    return str(sum(pair) + off)


def messages(pair: Pair, *, with_example: bool = True) -> list[Message]:
    """The conversation up to the point where the model replies.

    Args:
        pair: the operands.
        with_example: whether a solved addition comes first, as in the recipe.
    """
    example: list[Message] = [
        {"role": "user", "content": "What is 4 + 5?"},
        {"role": "assistant", "content": "9"},
    ]
    return [*(example if with_example else []), {"role": "user", "content": question(pair)}]


def is_right(reply: str, pair: Pair) -> bool:
    """Whether the last whole number in the reply is the sum; thousands separators are ignored."""
    numbers = _WHOLE_NUMBER.findall(reply.replace(",", ""))
    return bool(numbers) and int(numbers[-1]) == sum(pair)


def split_pairs(num_held_out: int, *, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """All pairs of operands in random order, cut in two.

    Args:
        num_held_out: how many pairs are kept for evaluation and never trained on.
        seed: of the order; the same seed gives the same cut everywhere.

    Returns:
        The pairs to train on, and those held out.
    """
    pairs = [(x, y) for x in range(OPERAND_MAX + 1) for y in range(OPERAND_MAX + 1)]
    random.Random(seed).shuffle(pairs)  # noqa: S311
    return pairs[num_held_out:], pairs[:num_held_out]
