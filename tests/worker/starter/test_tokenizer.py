"""The tokenizer speaks ChatML as Qwen3's renderers in tinker-cookbook do."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from worker.starter.corpus import load_corpus
from worker.starter.tokenizer import MARKUP_TOKENS, SPECIAL_TOKENS, VOCABULARY, save_tokenizer, train_tokenizer

TURNS = [
    {"role": "system", "content": "You are a poet."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "5"},
]
# Printed by tinker_cookbook 0.6.1, renderers.get_renderer("qwen3", tokenizer): build_supervised_example and
# build_generation_prompt; "qwen3_disable_thinking" adds the closed block.
PROMPT = (
    "<|im_start|>system\nYou are a poet.<|im_end|>\n"
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"
)
EMPTY_BLOCK = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(load_corpus().texts()), directory)
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


@pytest.mark.parametrize(
    "text", ["Hello, world!", "ünï — 中文 🙂", " two  spaces\n\n\tand 12,345.6 ", "<think>no</think>"]
)
def test_any_text_survives_a_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_markup_is_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    for token in SPECIAL_TOKENS + MARKUP_TOKENS:
        assert len(tokenizer.encode(token)) == 1
    assert tokenizer.eos_token == "<|im_end|>"
    assert len(tokenizer) == VOCABULARY


def test_think_blocks_stay_visible_when_special_tokens_are_skipped(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.encode("<think>\n\n</think>\n\nYes.<|im_end|>")
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "<think>\n\n</think>\n\nYes."


def test_every_digit_is_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("1905")) == ["1", "9", "0", "5"]


def test_prompt_is_rendered_as_the_cookbook_does(tokenizer: PreTrainedTokenizerFast) -> None:
    rendered = tokenizer.apply_chat_template(TURNS[:-1], tokenize=False, add_generation_prompt=True)
    assert rendered == PROMPT


def test_prompt_without_thinking_closes_the_block(tokenizer: PreTrainedTokenizerFast) -> None:
    rendered = tokenizer.apply_chat_template(
        TURNS[:-1], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert rendered == PROMPT + EMPTY_BLOCK


def test_only_the_last_turn_is_framed_by_a_think_block(tokenizer: PreTrainedTokenizerFast) -> None:
    rendered = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert rendered == PROMPT + EMPTY_BLOCK + "5<|im_end|>\n"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "5", "reasoning_content": "2 and 3"},
        {"role": "assistant", "content": "<think>\n2 and 3\n</think>\n\n5"},
    ],
)
def test_reasoning_is_written_into_the_block(tokenizer: PreTrainedTokenizerFast, message: dict[str, str]) -> None:
    rendered = tokenizer.apply_chat_template([*TURNS[:-1], message], tokenize=False)
    assert rendered == PROMPT + "<think>\n2 and 3\n</think>\n\n5<|im_end|>\n"


def test_rendered_text_and_its_parts_have_the_same_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    # given the parts in which renderers encode a turn
    parts = ["<|im_start|>user\n", "What is 2 + 3?", "<|im_end|>", "\n<|im_start|>assistant\n", EMPTY_BLOCK + "5"]
    # then cutting there does not change the tokens
    assert [token for part in parts for token in tokenizer.encode(part)] == tokenizer.encode("".join(parts))
