"""With the deterministic setting, bits depend on the operation and the hardware alone: odd models and other workers."""

from __future__ import annotations

import json

import pytest
import torch
from structlog.testing import capture_logs
from torch import nn

from jobs.operations import ForwardBackwardOutcome, LoraConfig
from tests.numerics.test_company import assert_identical
from tests.worker.engine.factories import make_operation, make_state, make_trainer
from tests.worker.engine.models import make_base_model, make_model
from worker.engine.base_model import BaseModel
from worker.engine.elementwise import RowFunction, Way
from worker.engine.errors import UnsupportedModelError
from worker.engine.numerics import HEAD_ROWS, SEGMENT_TOKENS, differences, is_deterministic
from worker.engine.rows import LADDER, Products, choose_rule
from worker.engine.run_state import RunState, Staging
from worker.engine.trainer import Trainer, TrainRequest

ODD = {
    "dense": ("qwen3", {"hidden_size": 40, "intermediate_size": 37}),
    "experts": ("qwen3_moe", {"hidden_size": 36, "moe_intermediate_size": 20, "num_experts": 7}),
}
"""Models whose widths are not divisible by 16."""
BODIES = (make_operation((5, 1, 33), seed=1), make_operation((2,), loss_fn="ppo", seed=2), make_operation((17, 40)))


def make_odd(name: str, **changes: int) -> BaseModel:
    architecture, sizes = ODD[name]
    return make_base_model(architecture, **sizes, **changes)


@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("name", ODD)
def test_odd_widths_and_ranks_packed_in_any_order_equal_alone(name: str, rank: int) -> None:
    # given runs of a rank that is no multiple of anything, on a model whose widths are not either
    base_model = make_odd(name)
    trainer = make_trainer(base_model)
    lora = LoraConfig(rank=rank)
    alone, together, reversed_ = ([make_state(base_model, lora) for _ in BODIES] for _ in range(3))
    # when each runs alone, all together, and all together in another order
    outcomes_alone = [trainer.run([TrainRequest(s, b)]).outcomes[0] for s, b in zip(alone, BODIES, strict=True)]
    outcomes = trainer.run([TrainRequest(s, b) for s, b in zip(together, BODIES, strict=True)]).outcomes
    requests = [TrainRequest(s, b) for s, b in zip(reversed_, BODIES, strict=True)]
    outcomes_reversed = trainer.run(requests[::-1]).outcomes[::-1]
    # then every number is the same
    for i in range(len(BODIES)):
        assert_identical(outcomes[i], outcomes_alone[i])
        assert_identical(outcomes_reversed[i], outcomes_alone[i])
        assert torch.equal(together[i].gradients.flat, alone[i].gradients.flat)
        assert torch.equal(reversed_[i].gradients.flat, alone[i].gradients.flat)


def test_another_worker_with_other_limits_computes_the_same_bits() -> None:
    # given an operation of several segments, and two workers of which one takes much in a pass, the other little
    lengths = [200] * (SEGMENT_TOKENS // 200 + 2)
    body = make_operation(lengths, seed=3)
    gradients, outcomes = [], []
    for tokens_max in (4 * SEGMENT_TOKENS, 64):
        base_model = make_base_model("qwen3")
        trainer = Trainer(base_model, tokens_max=tokens_max, segment_tokens=SEGMENT_TOKENS, logprobs_chunk=HEAD_ROWS)
        state = make_state(base_model)
        # when both run it
        (outcome,) = trainer.run([TrainRequest(state, body)]).outcomes
        assert isinstance(outcome, ForwardBackwardOutcome)
        outcomes.append(outcome)
        gradients.append(state.gradients.flat)
    # then there is no difference, though there were several segments
    assert sum(lengths) > SEGMENT_TOKENS
    assert_identical(*outcomes)
    assert torch.equal(*gradients)


def test_without_the_setting_rows_do_depend_on_company() -> None:
    # given products as they are without the setting, of shapes that fall out of step on some machine or other
    plain, exact = Products(exact=False), Products(exact=True)
    generator = torch.Generator().manual_seed(0)
    differing = 0
    for size_out, size_in in ((48, 32), (768, 256), (7, 40), (1, 333)):
        x, weight = torch.randn(64, size_in, generator=generator), torch.randn(size_out, size_in, generator=generator)
        # when rows are multiplied alone and in company
        for count in (1, 2, 3, 5):
            differing += not torch.equal(plain.frozen(x[:count], weight.t()), plain.frozen(x, weight.t())[:count])
            # then they are the same with the setting
            assert torch.equal(exact.frozen(x[:count], weight.t()), exact.frozen(x, weight.t())[:count])
    if differing == 0:
        pytest.skip("on this machine products keep their rows without padding, too")


def test_the_self_test_takes_the_first_rule_that_keeps_rows_and_gives_every_worker_the_same() -> None:
    # given a weight, and ladders that begin with a rule that cannot hold
    weight = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    # when rules are chosen, and chosen again elsewhere
    chosen = choose_rule(weight)
    # then it is the same, and the surest would do as well
    assert choose_rule(weight.clone()) == chosen
    assert choose_rule(weight, ladder=LADDER[-1:]) == LADDER[-1]
    assert make_base_model("llama").numerics == make_base_model("llama").numerics


def test_a_product_that_never_repeats_is_refused_and_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    # given a machine where no rule holds
    monkeypatch.setattr("worker.engine.rows._keeps_rows", lambda *_: False)
    # when a model is loaded; then it is refused, and without the setting it is not
    with pytest.raises(UnsupportedModelError, match="PIECEWORK_DETERMINISTIC=off"):
        make_base_model("qwen3")
    assert not BaseModel(make_model("qwen3"), name="plain", deterministic=False).deterministic


def test_company_that_shows_is_refused_when_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    # given kernels that the trial of products misses: here, padding is forgotten afterwards
    monkeypatch.setattr("worker.engine.rows.RowRule.product", lambda _, x, weight: x @ weight)
    monkeypatch.setattr("worker.engine.rows.RowRule.padded", lambda _, num_rows: num_rows)
    monkeypatch.setattr("worker.engine.rows._keeps_rows", lambda *_: True)
    # when; then
    with pytest.raises(UnsupportedModelError, match="other bits alone than in company"):
        make_base_model("qwen3")


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rows_of_an_activation_do_not_depend_on_their_number(threads: int) -> None:
    # given an activation at a width that fits no kernel, large enough for several threads
    torch.set_num_threads(threads)
    function = RowFunction(nn.functional.silu, of_one_number=True)
    x = torch.randn(700, 333, generator=torch.Generator().manual_seed(0))
    whole = function(x)
    # when parts of it are computed by themselves; then it is the same, and calling it plainly is not
    for start, count in ((0, 1), (3, 4), (5, 77), (1, 299)):
        assert torch.equal(function(x[start : start + count]), whole[start : start + count])
    assert function.ways[333] is not Way.WHOLE


def test_a_snapshot_taken_on_other_numerics_is_noticed() -> None:
    # given a snapshot of a worker with another number of threads
    base_model = make_base_model("qwen3")
    state = make_state(base_model)
    same = state.copy(Staging()).pieces()
    state.numerics = {**state.numerics, "threads": "64"}
    other = state.copy(Staging()).pieces()
    # when a worker takes the run over; then it says what differs, and only then
    with capture_logs() as logs:
        RunState.deserialize(base_model, state.lora, map(bytes, same))
    assert logs == []
    with capture_logs() as logs:
        taken = RunState.deserialize(base_model, state.lora, map(bytes, other))
    assert [line["event"] for line in logs] == ["numerics_differ"]
    assert logs[0]["snapshot_and_here"] == {"threads": ("64", str(torch.get_num_threads()))}
    assert json.dumps(taken.numerics) == json.dumps(base_model.numerics)


def test_products_that_one_worker_has_not_met_are_no_difference() -> None:
    assert differences({"rows of 1x2": "a", "torch": "1"}, {"rows of 3x4": "b", "torch": "1"}) == {}
    assert differences({"rows of 1x2": "a"}, {"rows of 1x2": "b"}) == {"rows of 1x2": ("a", "b")}


def test_auto_means_on_on_cpu_alone() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda:0")
    assert is_deterministic("auto", cpu)
    assert not is_deterministic("off", cpu)
    assert not is_deterministic("auto", cuda)
