from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs.operations import LoraConfig, OptimStep
from tests.worker.engine.factories import make_operation, make_state, make_trainer
from tests.worker.engine.models import ARCHITECTURES, make_base_model
from worker.engine.adapter_file import WEIGHTS_FILE, read_adapter
from worker.engine.base_model import BaseModel
from worker.engine.errors import UnreadableStateError
from worker.engine.files import read_tensors
from worker.engine.optimizer import optim_step
from worker.engine.run_state import RunState, Staging
from worker.engine.trainer import TrainRequest

LORA = LoraConfig(rank=4)


def trained_state(base_model: BaseModel, lora: LoraConfig = LORA) -> RunState:
    """After one step, and with gradients accumulated since."""
    state, trainer = make_state(base_model, lora), make_trainer(base_model)
    trainer.run([TrainRequest(state, make_operation())])
    optim_step(state, OptimStep(learning_rate=1e-2))
    trainer.run([TrainRequest(state, make_operation(seed=3))])
    return state


def snapshot_of(state: RunState) -> bytes:
    """The file of its snapshot."""
    return b"".join(state.copy(Staging()).pieces())


def assert_same(one: RunState, other: RunState) -> None:
    for name in ("adapter", "gradients", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(one, name).flat, getattr(other, name).flat), name
    assert (one.step, one.num_accumulated) == (other.step, other.num_accumulated)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_snapshot_restores_everything_bit_for_bit(architecture: str) -> None:
    base_model = make_base_model(architecture)
    state = trained_state(base_model)
    assert_same(RunState.deserialize(base_model, LORA, [snapshot_of(state)]), state)


def test_snapshot_of_a_new_run_holds_its_weights_alone() -> None:
    base_model = make_base_model("qwen3")
    state = RunState.create(base_model, LORA)
    tensors, _ = read_tensors(snapshot_of(state))
    assert set(tensors) == {"weights"}
    assert_same(RunState.deserialize(base_model, LORA, [snapshot_of(state)]), state)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_checkpoint_restores_weights_and_optimizer_without_gradients(architecture: str) -> None:
    # given
    base_model = make_base_model(architecture)
    state = trained_state(base_model)
    data = state.checkpoint_bytes()
    # when
    loaded = RunState.from_checkpoint(base_model, LORA, data, with_optimizer=True)
    fresh = RunState.from_checkpoint(base_model, LORA, data, with_optimizer=False)
    # then
    state.clear_gradients()
    assert_same(loaded, state)
    assert torch.equal(fresh.adapter.flat, state.adapter.flat)
    assert fresh.step == 0
    assert not fresh.exp_avg.flat.any()


def test_checkpoint_holds_lora_tensors_alone_even_with_tied_embeddings() -> None:
    base_model = make_base_model("qwen3", tie_word_embeddings=True)
    tensors, _ = read_tensors(trained_state(base_model).checkpoint_bytes())
    assert all(".lora_A." in name or ".lora_B." in name for name in tensors)
    assert "base_model.model.lm_head.lora_A.weight" in tensors


def test_sampler_weights_are_read_back() -> None:
    base_model = make_base_model("qwen3_moe")
    lora = LoraConfig(rank=2, seed=5, train_attn=False)
    state = trained_state(base_model, lora)
    adapter = read_adapter(base_model, state.sampler_files()[WEIGHTS_FILE])
    assert torch.equal(adapter.flat, state.adapter.flat)
    assert adapter.lora == lora


def test_sampler_weights_can_start_a_run_but_not_its_optimizer() -> None:
    base_model = make_base_model("qwen3")
    state = trained_state(base_model)
    data = state.sampler_files()[WEIGHTS_FILE]
    loaded = RunState.from_checkpoint(base_model, LORA, data, with_optimizer=False)
    assert torch.equal(loaded.adapter.flat, state.adapter.flat)
    with pytest.raises(UnreadableStateError, match="no optimizer state"):
        RunState.from_checkpoint(base_model, LORA, data, with_optimizer=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 8}, "rank 4"),
        ({"alpha": 16.0}, "alpha"),
        ({"train_unembed": False}, "tensors that this run's adapter lacks"),
    ],
)
def test_checkpoint_of_another_adapter_is_refused(change: dict[str, float], message: str) -> None:
    base_model = make_base_model("qwen3")
    data = trained_state(base_model).checkpoint_bytes()
    with pytest.raises(UnreadableStateError, match=message):
        RunState.from_checkpoint(base_model, replace(LORA, **change), data, with_optimizer=True)  # type: ignore[arg-type]


def test_state_of_another_base_model_is_refused() -> None:
    base_model, other = make_base_model("qwen3"), make_base_model("llama")
    state = trained_state(base_model)
    with pytest.raises(UnreadableStateError, match="tiny/qwen3"):
        RunState.deserialize(other, LORA, [snapshot_of(state)])
    with pytest.raises(UnreadableStateError, match="tiny/qwen3"):
        RunState.from_checkpoint(other, LORA, state.checkpoint_bytes(), with_optimizer=True)
    with pytest.raises(UnreadableStateError, match="tiny/qwen3"):
        read_adapter(other, state.sampler_files()[WEIGHTS_FILE])


@pytest.mark.parametrize("damage", ["cut", "empty", "pickle"])
def test_damaged_bytes_are_refused(damage: str) -> None:
    base_model = make_base_model("qwen3")
    whole = snapshot_of(trained_state(base_model))
    data = {"cut": whole[: len(whole) // 2], "empty": b"", "pickle": b"\x80\x04\x95" + whole}[damage]
    with pytest.raises(UnreadableStateError, match="safetensors"):
        RunState.deserialize(base_model, LORA, [data])


def test_another_seed_may_load_a_checkpoint(tmp_path: Path) -> None:
    base_model = make_base_model("qwen3")
    state = trained_state(base_model)
    loaded = RunState.from_checkpoint(base_model, replace(LORA, seed=99), state.checkpoint_bytes(), with_optimizer=True)
    assert torch.equal(loaded.adapter.flat, state.adapter.flat)
