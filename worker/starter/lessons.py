"""Turns the corpus and the additions into rows of tokens with a mark on each token that is learned.

A row begins at the start of a conversation. Additions are learned on the answer alone: their operands are random, and
guessing them would only be noise in the gradient.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from worker.starter import arithmetic
from worker.starter.corpus import Corpus, Message
from worker.starter.tokenizer import EMPTY_THOUGHT, END_OF_TEXT, MESSAGE_END

# B rows, T tokens of a row.

NOT_LEARNED = -100
"""The target of a token that carries no loss."""

_FRAMED_SHARE = 0.3
"""Share of conversations whose last turn opens with the empty think block, as the chat template writes it."""
_EXAMPLE_SHARE = 0.35
"""Share of batches of additions in which the recipe's solved example comes first. The others are shorter and teach the
same; more forms than these two would make it several times as long to learn."""

Row = tuple[list[int], list[bool]]
"""Tokens, and whether each of them is learned."""


@dataclass(frozen=True)
class Batch:
    """Rows of equal length: `tokens_BT` are read, `targets_BT` predicted (int64, `NOT_LEARNED` where no loss)."""

    tokens_BT: torch.Tensor  # noqa: N815
    targets_BT: torch.Tensor  # noqa: N815


def to_batch(rows: Sequence[Row], pad: int) -> Batch:
    """Pad rows on the right and shift: position t predicts token t + 1.

    Args:
        rows: tokens and marks.
        pad: token that fills short rows; it never carries loss.
    """
    width = max(len(tokens) for tokens, _ in rows)
    tokens_BT = torch.full((len(rows), width), pad)
    targets_BT = torch.full((len(rows), width), NOT_LEARNED)
    for b, (tokens, learned) in enumerate(rows):
        row = torch.tensor(tokens)
        tokens_BT[b, : len(tokens)] = row
        targets_BT[b, : len(tokens)] = row.where(torch.tensor(learned), NOT_LEARNED)
    return Batch(tokens_BT[:, :-1].contiguous(), targets_BT[:, 1:].contiguous())


class Lessons:
    """Endless batches of text and of additions, in an order that depends on the seed alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, pairs: Sequence[arithmetic.Pair], seed: int):
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)  # noqa: S311
        self._pairs = pairs
        self._plain = [self._render(turns, "") for turns in corpus.conversations]
        self._framed = [self._render(turns, EMPTY_THOUGHT) for turns in corpus.conversations]
        self._prose = [self._encode(text + END_OF_TEXT) for text in corpus.prose]
        self.pad = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
        self._text_rows: Iterator[Row] = iter(())

    def prompt(self, conversation: list[Message]) -> list[int]:
        """Tokens up to where the model replies."""
        return self._encode(
            self._tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        )

    def addition(self, pair: arithmetic.Pair, reply: str | None = None, *, with_example: bool = True) -> Row:
        """One addition; the reply (by default the right one) and the end of the turn are learned."""
        prompt = self.prompt(arithmetic.messages(pair, with_example=with_example))
        learned = self._encode((reply or arithmetic.answer(pair)) + MESSAGE_END)
        return prompt + learned, [False] * len(prompt) + [True] * len(learned)

    def additions(self, num_rows: int, *, share_of_slips: float = 0.0) -> Batch:
        """A batch of additions, all of one form, so that rows differ by a few digits only.

        Args:
            num_rows: rows.
            share_of_slips: share of rows whose reply is close to the sum, but wrong.
        """
        with_example = self._rng.random() < _EXAMPLE_SHARE
        rows: list[Row] = []
        for pair in self._rng.choices(self._pairs, k=num_rows):
            reply = arithmetic.slip(pair, self._rng) if self._rng.random() < share_of_slips else None
            rows.append(self.addition(pair, reply, with_example=with_example))
        return to_batch(rows, self.pad)

    def text(self, num_rows: int, tokens_max: int) -> Batch:
        """A batch of rows of text; every token is learned, the think block of a framed turn included.

        Args:
            num_rows: rows.
            tokens_max: length of a row, in tokens; a longer text is cut.
        """
        rows: list[Row] = []
        while len(rows) < num_rows:
            row = next(self._text_rows, None)
            if row is None:
                self._text_rows = self._pack(tokens_max)
            else:
                rows.append(row)
        return to_batch(rows, self.pad)

    def _pack(self, tokens_max: int) -> Iterator[Row]:
        """One pass over the corpus in a new order, whole texts together in a row while they fit."""
        both = zip(self._plain, self._framed, strict=True)
        pieces = [framed if self._rng.random() < _FRAMED_SHARE else plain for plain, framed in both] + self._prose
        self._rng.shuffle(pieces)
        row: list[int] = []
        for piece in pieces:
            if row and len(row) + len(piece) > tokens_max:
                yield row, [True] * len(row)
                row = []
            row = row + piece[:tokens_max]
        if row:
            yield row, [True] * len(row)

    def _render(self, turns: list[Message], thought: str) -> list[int]:
        prompt = self._tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
        return self._encode(f"{prompt}{thought}{turns[-1]['content']}{MESSAGE_END}\n")

    def _encode(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return tokens
