"""When a sequence ends by itself: a stop token, or a stop string in its text.

What always holds: a condition sees every sampled token once, in order, and the token that completes a stop is part of
the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

Decode = Callable[[list[int]], str]

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for the bytes of a character whose rest is still to come."""
_UNFINISHED_TOKENS_MAX = 8
"""After so many tokens a replacement character is taken for what the model meant (UTF-8 has at most four bytes)."""
_CONTEXT_TOKENS = 4
"""Tokens of the prompt that are decoded with the first sampled ones; some tokenizers drop a leading space."""


class StopCondition(Protocol):
    """Decides after each token whether the sequence ends with it."""

    def push(self, token: int) -> bool:
        """Take the next sampled token; True if the sequence ends with it."""
        ...


class StopTokens:
    """Ends at any of a set of tokens; an empty set never ends."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = frozenset(tokens)

    def push(self, token: int) -> bool:
        """True for a stop token."""
        return token in self._tokens


class StopStrings:
    """Ends when the sampled text contains one of the strings.

    Text is decoded incrementally: a window of tokens before the newest is decoded with and without them, so that
    tokens that are parts of one character, or whose text depends on their left neighbour, read as in the whole text.
    """

    def __init__(self, strings: Sequence[str], decode: Decode, prompt: Sequence[int]) -> None:
        self._strings = tuple(strings)
        self._decode = decode
        self._keep = max(len(string) for string in strings) - 1
        context = list(prompt[-_CONTEXT_TOKENS:])
        if decode(context).endswith(_UNFINISHED):
            context = []
        self._ids = context
        self._num_read = len(context)
        """Tokens of the window whose text is in `_tail` already, or belongs to the prompt."""
        self._tail = ""

    def push(self, token: int) -> bool:
        """True if the text that this token completes contains a stop string."""
        self._ids.append(token)
        known = self._decode(self._ids[: self._num_read])
        text = self._decode(self._ids)
        unread = self._tail + text[len(known) :]
        if any(string in unread for string in self._strings):
            return True
        num_new = len(self._ids) - self._num_read
        if not text.endswith(_UNFINISHED) or num_new >= _UNFINISHED_TOKENS_MAX:
            self._tail = unread[max(0, len(unread) - self._keep) :]
            self._ids = self._ids[self._num_read :]
            self._num_read = num_new
        return False


def make_stop(
    stop: tuple[str, ...] | tuple[int, ...] | None,
    *,
    eos_token_ids: Sequence[int],
    decode: Decode | None,
    prompt: Sequence[int],
) -> StopCondition:
    """The stop condition of one sequence.

    Args:
        stop: None for the model's end-of-sequence tokens, empty for never, else strings or token ids.
        eos_token_ids: of the base model.
        decode: token ids to text with special tokens kept; needed for strings.
        prompt: token ids before the first sampled one.
    """
    if stop is None:
        return StopTokens(eos_token_ids)
    strings = [item for item in stop if isinstance(item, str)]
    if not strings:
        return StopTokens([int(item) for item in stop])
    assert decode is not None, "stop strings are refused at the door when there is no tokenizer"
    return StopStrings(strings, decode, prompt)


def make_decode(tokenizer: Any) -> Decode | None:
    """Token ids to exact text, from a `transformers` or a `tokenizers` tokenizer; None if there is none."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None or hasattr(tokenizer, "decode_batch"):
        fast = tokenizer if backend is None else backend
        return lambda ids: str(fast.decode(ids, skip_special_tokens=False))
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
