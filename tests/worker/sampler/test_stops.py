"""Stop tokens and stop strings are seen as soon as they are complete, however the text is cut into tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from worker.sampler.stops import StopStrings, make_decode, make_stop

END = "<|end|>"


def make_tokenizer() -> Tokenizer:
    """A byte-level tokenizer: one token per byte, some merges, one special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    merges = []
    for left, right in (("t", "h"), ("th", "e"), ("\u0120", "s"), ("o", "p"), ("\u00c3", "\u00a9"), ("!", "\u00f0")):
        merges.append((left, right))
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return tokenizer


TOKENIZER = make_tokenizer()
DECODE = make_decode(TOKENIZER)


def tokens_until_stop(strings: tuple[str, ...], ids: list[int], prompt: list[int] | None = None) -> int | None:
    """How many tokens are taken, the last one being that which ends the sequence."""
    stop = make_stop(strings, eos_token_ids=(), decode=DECODE, prompt=prompt or [])
    return next((count for count, token in enumerate(ids, 1) if stop.push(token)), None)


def first_count_with(strings: tuple[str, ...], ids: list[int]) -> int | None:
    """The same by brute force: decode every prefix whole."""
    assert DECODE is not None
    counts = range(1, len(ids) + 1)
    return next((count for count in counts if any(string in DECODE(ids[:count]) for string in strings)), None)


@pytest.mark.parametrize(
    ("text", "strings", "expected"),
    [
        ("over the stop sign", ("stop",), "over the stop"),
        ("the end\n\nUser:", ("\n\nUser",), "the end\n\nUser"),
        ("café crème", ("é",), "café"),
        ("smile \U0001f600 please", ("\U0001f600",), "smile \U0001f600"),
        ("wait!\U0001f600", ("!",), None),
        ("aab", ("ab", "zzz"), "aab"),
        (f"yes{END} no", (END,), f"yes{END}"),
    ],
)
def test_a_sequence_ends_with_the_token_that_completes_a_stop_string(
    text: str, strings: tuple[str, ...], expected: str | None
) -> None:
    # given text as tokens, and stop strings
    ids = TOKENIZER.encode(text).ids

    # when the tokens come one by one
    count = tokens_until_stop(strings, ids)

    # then the sequence ends where decoding everything each time would end it
    assert count == first_count_with(strings, ids)
    if expected is not None:
        assert TOKENIZER.decode(ids[:count], skip_special_tokens=False) == expected


@given(st.text(max_size=40), st.text(min_size=1, max_size=4), st.integers(0, 40))
def test_stop_strings_are_found_where_decoding_everything_finds_them(text: str, string: str, place: int) -> None:
    # given any text that may hold the stop string, without the sign for undecodable bytes
    text = (text[:place] + string + text[place:]).replace("\ufffd", "")
    string = string.replace("\ufffd", "?")
    ids = TOKENIZER.encode(text).ids

    # when the tokens come one by one; then it is found neither early nor late
    assert tokens_until_stop((string,), ids) == first_count_with((string,), ids)


def test_text_of_the_prompt_does_not_count() -> None:
    # given a prompt that ends with most of the stop string
    prompt, ids = TOKENIZER.encode("the st").ids, TOKENIZER.encode("op stop").ids

    # when the rest is sampled
    count = tokens_until_stop(("stop",), ids, prompt)

    # then only what was sampled is searched
    assert count == len(ids)


def test_a_prompt_that_ends_inside_a_character_is_survived() -> None:
    # given a prompt that ends with the first byte of a character
    prompt = TOKENIZER.encode("é").ids if len(TOKENIZER.encode("é").ids) > 1 else TOKENIZER.encode("\U0001f600").ids
    ids = TOKENIZER.encode("so stop").ids

    # when sampling goes on with other text; then the stop string is found
    assert tokens_until_stop(("stop",), ids, prompt[:1]) == len(ids)


def test_bytes_that_never_become_a_character_do_not_hide_a_stop_string() -> None:
    # given a lone byte, again and again, and then a stop string
    lone = TOKENIZER.encode("\U0001f600").ids[0]
    ids = [lone] * 30 + TOKENIZER.encode("stop").ids

    # when the tokens come one by one; then it is found all the same
    assert tokens_until_stop(("stop",), ids) == len(ids)


def test_token_stops() -> None:
    # given the three kinds of token stop
    eos = make_stop(None, eos_token_ids=(3, 4), decode=None, prompt=[])
    never = make_stop((), eos_token_ids=(3, 4), decode=None, prompt=[])
    listed = make_stop((9,), eos_token_ids=(3, 4), decode=None, prompt=[])

    # when tokens come; then absent means end of sequence, empty means never, a list means itself
    assert [eos.push(token) for token in (1, 9, 4)] == [False, False, True]
    assert [never.push(token) for token in (1, 9, 4)] == [False, False, False]
    assert [listed.push(token) for token in (1, 4, 9)] == [False, False, True]


def test_tokenizers_of_transformers_decode_alike() -> None:
    # given the same tokenizer as transformers wraps it
    wrapped = make_decode(PreTrainedTokenizerFast(tokenizer_object=TOKENIZER))
    ids = TOKENIZER.encode(f"the stop .{END} ,").ids

    # when both decode
    assert DECODE is not None
    assert wrapped is not None

    # then nothing is cleaned up or left out
    assert wrapped(ids) == DECODE(ids) == f"the stop .{END} ,"
    assert make_decode(None) is None


def test_only_a_window_of_tokens_is_kept() -> None:
    # given a stop condition on a long text
    assert DECODE is not None
    decoded: list[int] = []

    def counting(ids: list[int]) -> str:
        decoded.append(len(ids))
        return DECODE(ids) if DECODE else ""

    stop = StopStrings(("zzzz",), counting, [])

    # when many tokens come
    for token in TOKENIZER.encode("the stop is far away " * 20).ids:
        assert not stop.push(token)

    # then each decodes a few tokens, not all so far
    assert max(decoded) <= 10
