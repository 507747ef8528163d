from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Qwen3Config, T5Config

from tests.worker.engine.models import ARCHITECTURES, make_config, make_model, save_model
from worker.engine.attention import PackedAttention
from worker.engine.base_model import BaseModel
from worker.engine.errors import UnsupportedModelError

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_model_is_loaded_from_a_directory(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    directory = save_model(tmp_path, architecture)
    base_model = BaseModel.load(directory, name="served/name", device=CPU, dtype=dtype)
    assert (base_model.name, base_model.dtype, base_model.device) == ("served/name", dtype, CPU)
    assert (base_model.vocab_size, base_model.context_length, base_model.eos_token_ids) == (96, 256, (1,))
    assert base_model.num_parameters == sum(p.numel() for p in make_model(architecture).parameters())


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    directory = save_model(tmp_path, "qwen3")
    torch.save({}, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match="safetensors"):
        BaseModel.load(directory, name="m", device=CPU, dtype=torch.float32)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (make_config("qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=1), "sliding"),
        (make_config("qwen3_moe", use_sliding_window=True, sliding_window=8), "sliding"),
        (T5Config(vocab_size=8), "encoder-decoder"),
        (
            Qwen3Config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "longest sequence",
        ),
    ],
    ids=["sliding", "sliding-moe", "encoder-decoder", "dynamic-rotary"],
)
def test_what_packing_cannot_do_is_refused_by_config(config: Any, reason: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match=reason):
        BaseModel.load(tmp_path, name="m", device=CPU, dtype=torch.float32)


def test_an_architecture_that_computes_something_else_is_refused() -> None:
    # given a model that caps its logits, which no part of the config that is read says
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        layer_types=["full_attention"],
        attn_logit_softcapping=None,
        final_logit_softcapping=0.5,
        initializer_range=0.3,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # when, then
    with pytest.raises(UnsupportedModelError, match="other logits"):
        BaseModel(model, name="gemma")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_pass_equals_separate_passes_of_the_plain_model(architecture: str) -> None:
    # given
    plain = make_model(architecture)
    base_model = BaseModel(make_model(architecture), name="m")
    sequences = [torch.arange(3), torch.arange(40) % 96, torch.arange(50, 60)]
    tokens = torch.cat(sequences)
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    attention = PackedAttention([(0, 3), (3, 43), (43, 53)], 53)
    # when
    with torch.no_grad():
        logits = base_model.logits(base_model.hidden(tokens, positions, segments=[], attention=attention), [])
        wanted = torch.cat([plain(s[None]).logits[0] for s in sequences])
    # then
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)
