"""On CPU, what an operation computes is the same bit for bit, whatever it is packed with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from jobs.operations import Failure, ForwardBackward, ForwardBackwardOutcome, LoraConfig
from tests.worker.engine.factories import make_operation, make_state, make_trainer
from tests.worker.engine.models import ARCHITECTURES, make_base_model, make_model
from worker.engine.base_model import BaseModel
from worker.engine.rows import Products
from worker.engine.run_state import RunState
from worker.engine.trainer import Trainer, TrainRequest

CONFIGS = (
    LoraConfig(rank=4, seed=1),
    LoraConfig(rank=1, seed=2, train_unembed=False),
    LoraConfig(rank=7, seed=3, train_attn=False),
    LoraConfig(rank=16, seed=4, train_mlp=False),
)
BODIES = (
    make_operation((5, 1, 33), seed=1),
    make_operation((2,), loss_fn="ppo", seed=2),
    make_operation((17, 40), loss_fn="cispo", seed=3),
    make_operation((9, 9, 9), loss_fn="importance_sampling", seed=4),
)


def states_of(base_model: BaseModel) -> list[RunState]:
    return [make_state(base_model, lora) for lora in CONFIGS]


def run(trainer: Trainer, *requests: TrainRequest) -> list[ForwardBackwardOutcome | Failure]:
    return trainer.run(requests).outcomes


def assert_identical(one: ForwardBackwardOutcome | Failure, other: ForwardBackwardOutcome | Failure) -> None:
    assert isinstance(one, ForwardBackwardOutcome), one
    assert isinstance(other, ForwardBackwardOutcome), other
    for left, right in zip(one.logprobs, other.logprobs, strict=True):
        np.testing.assert_array_equal(left, right)
    assert one.metrics == other.metrics


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_with_other_runs_equals_alone(architecture: str, threads: int) -> None:
    # given four runs of different ranks, sites and losses
    torch.set_num_threads(threads)
    base_model = make_base_model(architecture)
    trainer = make_trainer(base_model)
    alone, together, reversed_ = states_of(base_model), states_of(base_model), states_of(base_model)
    # when each runs alone, all together, and all together in another order
    outcomes_alone = [run(trainer, TrainRequest(s, b))[0] for s, b in zip(alone, BODIES, strict=True)]
    outcomes = run(trainer, *(TrainRequest(s, b) for s, b in zip(together, BODIES, strict=True)))
    outcomes_reversed = run(trainer, *reversed([TrainRequest(s, b) for s, b in zip(reversed_, BODIES, strict=True)]))
    # then every number is the same
    for i in range(len(BODIES)):
        assert_identical(outcomes[i], outcomes_alone[i])
        assert_identical(outcomes_reversed[-1 - i], outcomes_alone[i])
        assert torch.equal(together[i].gradients.flat, alone[i].gradients.flat)
        assert torch.equal(reversed_[i].gradients.flat, alone[i].gradients.flat)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_equals_forward_backward(architecture: str) -> None:
    # given
    base_model = make_base_model(architecture)
    trainer, state = make_trainer(base_model), make_state(base_model)
    # when the same data go forward only, beside training of others
    forward = replace(BODIES[0], forward_only=True)
    other = make_state(base_model, CONFIGS[1])
    outcomes = run(
        trainer, TrainRequest(state, forward), TrainRequest(other, BODIES[1]), TrainRequest(state, BODIES[0])
    )
    # then
    assert_identical(outcomes[0], outcomes[2])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_operations_of_one_run_merged_in_one_call_equal_separate_calls(architecture: str) -> None:
    # given an operation that is cut into several chunks, between two others
    base_model = make_base_model(architecture)
    trainer = make_trainer(base_model, tokens_max=48)
    bodies = [make_operation((20, 30, 5, 44, 7), seed=6), make_operation((3, 3), seed=7), make_operation((60,), seed=8)]
    merged, separate = make_state(base_model), make_state(base_model)
    # when
    outcomes = run(trainer, *(TrainRequest(merged, body) for body in bodies))
    outcomes_separate = [run(trainer, TrainRequest(separate, body))[0] for body in bodies]
    # then
    for one, other in zip(outcomes, outcomes_separate, strict=True):
        assert_identical(one, other)
    assert torch.equal(merged.gradients.flat, separate.gradients.flat)
    assert merged.num_accumulated == separate.num_accumulated == 3


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_wider_model_packed_equals_alone_on_several_threads(dtype: torch.dtype, threads: int) -> None:
    # given a model wide enough that kernels split their work over threads
    torch.set_num_threads(threads)
    sizes = {"hidden_size": 128, "intermediate_size": 320, "head_dim": 32, "num_hidden_layers": 1}
    base_model = BaseModel(make_model("qwen3", **sizes).to(dtype), name="wide")
    trainer = make_trainer(base_model, tokens_max=2048, logprobs_chunk=128)
    body = make_operation((130, 7, 61), seed=1)
    company = make_operation((200, 180, 3, 220, 150, 99), seed=2)
    alone, together = make_state(base_model), make_state(base_model)
    others = [make_state(base_model, lora) for lora in CONFIGS[1:3]]
    # when
    outcome_alone = run(trainer, TrainRequest(alone, body))[0]
    requests = [TrainRequest(others[0], company), TrainRequest(together, body), TrainRequest(others[1], company)]
    outcome = run(trainer, *requests)[1]
    # then
    assert_identical(outcome, outcome_alone)
    assert torch.equal(together.gradients.flat, alone.gradients.flat)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_failing_neighbour_changes_nothing(architecture: str) -> None:
    # given a run whose weights are not finite, and a malformed operation
    base_model = make_base_model(architecture)
    trainer = make_trainer(base_model)
    alone, together, broken = make_state(base_model), make_state(base_model), make_state(base_model, CONFIGS[0])
    broken.adapter.flat.fill_(float("nan"))
    malformed = ForwardBackward((replace(BODIES[0].data[0], inputs={}),), "cross_entropy")
    # when
    outcome_alone = run(trainer, TrainRequest(alone, BODIES[0]))[0]
    requests = [TrainRequest(broken, BODIES[2]), TrainRequest(together, BODIES[0]), TrainRequest(broken, malformed)]
    outcomes = run(trainer, *requests)
    # then
    assert isinstance(outcomes[0], Failure)
    assert isinstance(outcomes[2], Failure)
    assert_identical(outcomes[1], outcome_alone)
    assert torch.equal(together.gradients.flat, alone.gradients.flat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("width_out", "width_in"),
    [
        (96, 32),
        (24, 32),
        (768, 256),
        (32, 1024),
        (1, 32),
        (32, 1),
        (2, 48),
        (2, 333),
        (5, 8),
        (7, 40),
        (8, 333),
        (40, 5),
    ],
)
def test_rows_of_a_product_do_not_depend_on_their_number(width_out: int, width_in: int, dtype: torch.dtype) -> None:
    # given
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(width_out, width_in, generator=generator).to(dtype)
    x = torch.randn(400, width_in, generator=generator).to(dtype)
    dy = torch.randn(400, width_out, generator=generator).to(dtype)
    products = Products(exact=True)
    for rows, matrix in ((x, weight.t()), (dy, weight)):
        for product in (products.frozen, products.adapted):
            whole = product(rows, matrix)
            # when, then
            for count in (*range(1, 40), 100, 333):
                assert torch.equal(product(rows[:count], matrix), whole[:count]), count
                assert torch.equal(product(rows[5 : 5 + count], matrix), whole[5 : 5 + count]), count
