"""The pure parts of `examples/supervised.py`."""

import json
import random
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "22"},
]


def text(tokens: Any) -> str:
    return "".join(chr(token) for token in tokens)


def test_every_answer_is_one_turn_with_all_that_was_said_before_as_its_prompt(supervised: ModuleType, tokenizer: Any):
    # given a conversation with two answers
    # when it is rendered
    turns = [(text(prompt), text(answer)) for prompt, answer in supervised.render_turns(tokenizer, CONVERSATION)]

    # then each answer ends where the model should stop, and the second prompt holds the first answer
    first = "system:Be brief.\x03\nuser:One?\x03\nassistant:"
    assert turns == [(first + "<>", "1\x03"), (first + "1\x03\nuser:Two?\x03\nassistant:<>", "22\x03")]


def test_a_template_that_does_not_continue_its_prompt_is_refused(supervised: ModuleType, tokenizer: Any):
    # given a template that writes another prompt than it continues
    tokenizer.apply_chat_template = lambda messages, **options: str(len(messages)) + str(options)

    # when and then
    with pytest.raises(ValueError, match="does not continue its own prompt"):
        next(supervised.render_turns(tokenizer, CONVERSATION))


def test_only_the_answer_has_loss_and_targets_are_the_next_tokens(supervised: ModuleType):
    # given a prompt of three tokens and an answer of two
    # when
    datum = supervised.make_datum([1, 2, 3], [4, 5])

    # then
    assert datum.model_input.to_ints() == [1, 2, 3, 4]
    assert list(datum.loss_fn_inputs["target_tokens"].data) == [2, 3, 4, 5]
    assert list(datum.loss_fn_inputs["weights"].data) == [0.0, 0.0, 1.0, 1.0]


def test_a_pass_holds_every_datum_once_and_the_next_pass_is_in_another_order(supervised: ModuleType):
    # given ten datums in batches of four
    data = supervised.batches(list(range(10)), 4, random.Random(0))

    # when
    first, second = ([datum for _ in range(3) for datum in next(data)] for _ in range(2))

    # then
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_the_loss_is_the_mean_over_tokens_that_have_loss(supervised: ModuleType):
    # given two datums whose answers have log-probabilities -1, -2 and -6
    batch = [supervised.make_datum([1, 2], [3, 4]), supervised.make_datum([1, 2], [3])]
    logprobs = [np.array([-9.0, -1.0, -2.0]), np.array([-9.0, -6.0])]
    output = SimpleNamespace(loss_fn_outputs=[{"logprobs": SimpleNamespace(data=values)} for values in logprobs])

    # when and then
    assert supervised.mean_loss(output, batch) == pytest.approx(3.0)


def test_conversations_are_read_line_by_line(supervised: ModuleType, tmp_path: Path):
    # given a file with an empty line at its end
    file = tmp_path / "conversations.jsonl"
    file.write_text(json.dumps({"messages": CONVERSATION}) + "\n\n", "utf-8")

    # when and then
    assert supervised.read_conversations(file) == [CONVERSATION]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        (b"\xff", "is not UTF-8 text"),
        (b"", "holds no conversation"),
        (b"\n{", "line 2: a conversation is"),
        (b"[]", "line 1: a conversation is"),
        (b'{"messages": [{"role": "user", "content": "hello"}]}', "with an answer of the assistant"),
    ],
)
def test_a_file_without_conversations_is_refused_in_a_sentence(
    supervised: ModuleType, tmp_path: Path, content: bytes | None, says: str
):
    # given
    file = tmp_path / "data.jsonl"
    if content is not None:
        file.write_bytes(content)

    # when and then
    with pytest.raises(SystemExit) as refused:
        supervised.read_conversations(file)
    assert str(refused.value).startswith(f"--data {file}")
    assert says in str(refused.value)


def test_the_plot_is_a_png(supervised: ModuleType, tmp_path: Path):
    # when
    supervised.plot([3.0, 2.0, 1.0], tmp_path / "new" / "loss.png", "title")

    # then
    assert (tmp_path / "new" / "loss.png").read_bytes().startswith(b"\x89PNG")
