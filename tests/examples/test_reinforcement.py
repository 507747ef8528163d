"""The pure parts of `examples/reinforcement.py`."""

from concurrent.futures import Future
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("answer", "reward"),
    [("81", 1.0), (" 81\n", 1.0), ("80", 0.0), ("", 0.0), ("The sum is 81", 0.0), ("81 81", 0.0), ("+81", 0.0)],
)
def test_only_the_sum_and_nothing_else_is_rewarded(reinforcement: ModuleType, answer: str, reward: float):
    assert reinforcement.Problem(33, 48).reward(answer) == reward


def test_advantages_are_standardized_within_the_group(reinforcement: ModuleType):
    # given one right answer of four: mean 1/4, standard deviation sqrt(3)/4
    # when
    values = reinforcement.advantages([1.0, 0.0, 0.0, 0.0])

    # then
    assert values == pytest.approx([3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)])
    assert sum(values) == pytest.approx(0.0)


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_a_group_that_agrees_has_no_advantage(reinforcement: ModuleType, reward: float):
    assert reinforcement.advantages([reward] * 4) == [0.0] * 4


def test_the_prompt_has_neither_advantage_nor_log_probabilities(reinforcement: ModuleType):
    # given a prompt of three tokens and an answer of two
    # when
    datum = reinforcement.make_datum([1, 2, 3], [4, 5], [-0.1, -0.2], 1.5)

    # then
    assert datum.model_input.to_ints() == [1, 2, 3, 4]
    assert list(datum.loss_fn_inputs["target_tokens"].data) == [2, 3, 4, 5]
    assert list(datum.loss_fn_inputs["logprobs"].data) == pytest.approx([0.0, 0.0, -0.1, -0.2])
    assert list(datum.loss_fn_inputs["advantages"].data) == [0.0, 0.0, 1.5, 1.5]


class Sampler:
    """Answers every prompt with the same texts, and remembers the prompts."""

    def __init__(self, answers: list[str]) -> None:
        self.answers = answers
        self.prompts: list[str] = []

    def sample(self, prompt: Any, num_samples: int, params: Any) -> Future[Any]:
        assert num_samples == len(self.answers)
        self.prompts.append("".join(chr(token) for token in prompt.to_ints()))
        tokens = [[*map(ord, answer), *params.stop] for answer in self.answers]
        future: Future[Any] = Future()
        sequences = [SimpleNamespace(tokens=t, logprobs=[-1.0] * len(t)) for t in tokens]
        future.set_result(SimpleNamespace(sequences=sequences))
        return future


def test_groups_that_agree_are_left_out_but_count_in_the_share(reinforcement: ModuleType, tokenizer: Any):
    # given answers of which one is right for the first addition and none for the second
    sampler = Sampler(["3", "4"])
    problems = [reinforcement.Problem(1, 2), reinforcement.Problem(5, 6)]

    # when
    datums, share = reinforcement.roll_out(
        sampler, problems, tokenizer, SimpleNamespace(group_size=2, no_thinking=False)
    )

    # then the first group alone teaches: its right answer up, its wrong one down
    assert share == 0.25
    assert [list(datum.loss_fn_inputs["advantages"].data)[-1] for datum in datums] == [1.0, -1.0]
    assert sampler.prompts[0].endswith("assistant:9\x03\nuser:What is 1 + 2?\x03\nassistant:")


def test_a_model_that_thinks_can_be_told_to_answer_at_once(reinforcement: ModuleType, tokenizer: Any):
    # given one addition
    problem = reinforcement.Problem(1, 2)

    # when the prompt is rendered both ways
    default, at_once = (problem.prompt(tokenizer, thinking=thinking) for thinking in (True, False))

    # then they differ in the closed think block alone
    assert "".join(map(chr, at_once)) == "".join(map(chr, default)) + "<>"
