from __future__ import annotations

import math

import pytest
import torch

from jobs.operations import LoraConfig
from tests.worker.engine.models import make_base_model
from worker.engine.adapter import Adapter
from worker.engine.errors import UnsupportedAdapterError

CPU = torch.device("cpu")


def test_a_is_kaiming_uniform_and_b_is_zero() -> None:
    base_model, lora = make_base_model("qwen3"), LoraConfig(rank=64, seed=3)
    adapter = Adapter.create(base_model.layout(lora), lora, CPU)
    for site in adapter.layout.sites:
        bound = 1 / math.sqrt(site.in_features)
        a = adapter.a[site.name]
        assert a.abs().max() <= bound
        assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert not adapter.b[site.name].any()
    assert adapter.scaling == 32 / 64


def test_weights_depend_on_the_seed_and_not_on_the_other_sites() -> None:
    base_model = make_base_model("qwen3")

    def weights(lora: LoraConfig) -> torch.Tensor:
        return Adapter.create(base_model.layout(lora), lora, CPU).a["lm_head"]

    everywhere = weights(LoraConfig(rank=4, seed=1))
    assert torch.equal(everywhere, weights(LoraConfig(rank=4, seed=1, train_attn=False, train_mlp=False)))
    assert not torch.equal(everywhere, weights(LoraConfig(rank=4, seed=2)))


@pytest.mark.parametrize(
    ("flags", "modules"),
    [
        ({"train_mlp": False, "train_unembed": False}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ({"train_attn": False, "train_unembed": False}, {"gate_proj", "up_proj", "down_proj"}),
        ({"train_attn": False, "train_mlp": False}, {"lm_head"}),
    ],
)
def test_each_flag_adapts_its_modules(flags: dict[str, bool], modules: set[str]) -> None:
    layout = make_base_model("llama").layout(LoraConfig(rank=4, **flags))
    assert {site.name.rsplit(".", 1)[-1] for site in layout.sites} == modules


def test_train_mlp_adapts_every_expert_and_never_the_router() -> None:
    layout = make_base_model("qwen3_moe").layout(LoraConfig(rank=4, train_attn=False, train_unembed=False))
    assert {site.name.split(".mlp.")[1] for site in layout.sites} == {"experts.gate_up_proj", "experts.down_proj"}
    assert {site.num_experts for site in layout.sites} == {4}


def test_dense_layers_of_a_mixture_model_are_adapted_too() -> None:
    base_model = make_base_model("qwen3_moe", mlp_only_layers=[0])
    layout = base_model.layout(LoraConfig(rank=4, train_attn=False, train_unembed=False))
    names = {site.name.split("layers.")[1] for site in layout.sites}
    assert names == {
        "0.mlp.gate_proj",
        "0.mlp.up_proj",
        "0.mlp.down_proj",
        "1.mlp.experts.gate_up_proj",
        "1.mlp.experts.down_proj",
    }


def test_an_adapter_of_nothing_is_refused() -> None:
    lora = LoraConfig(rank=4, train_attn=False, train_mlp=False, train_unembed=False)
    with pytest.raises(UnsupportedAdapterError, match="at least one"):
        make_base_model("qwen3").layout(lora)
