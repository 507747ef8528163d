"""Random models, adapters and operations, the same on every machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from jobs.operations import Datum, ForwardBackward, LoraConfig
from worker.engine.base_model import BaseModel
from worker.engine.run_state import RunState

ARCHITECTURES = ("qwen3", "llama", "qwen3_moe")

_SHAPES: dict[str, dict[str, Any]] = {
    "nano": {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "intermediate_size": 96,
        "vocab_size": 256,
    },
    "tiny": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 768,
        "vocab_size": 4096,
    },
    "small": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 2048,
        "vocab_size": 4096,
    },
    "0.6b": {
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
}
_CHECKED: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 96, "vocab_size": 256, "initializer_range": 0.2,
}  # fmt: skip
_COMMON: dict[str, Any] = {"max_position_embeddings": 4096, "eos_token_id": 1, "pad_token_id": None}


def make_checked_model(architecture: str) -> Any:
    """A plain fp32 model on CPU, small, with logits that differ."""
    torch.manual_seed(7)
    shape = {"tie_word_embeddings": False, **_CHECKED, **_COMMON}
    if architecture == "qwen3":
        config: Any = Qwen3Config(**shape)
    elif architecture == "llama":
        config = LlamaConfig(**shape)
    else:
        experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
        config = Qwen3MoeConfig(**shape, **experts)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def make_sized_model(size: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A plain model of the size to be measured, on its device."""
    torch.manual_seed(7)
    shape = {"tie_word_embeddings": False, **_SHAPES[size], **_COMMON}
    with device:
        return AutoModelForCausalLM.from_config(Qwen3Config(**shape), dtype=dtype).eval()


def make_state(base_model: BaseModel, lora: LoraConfig) -> RunState:
    """A run whose B is not zero, as if it had been trained."""
    state = RunState.create(base_model, lora)
    generator = torch.Generator().manual_seed(lora.seed + 1)
    noise = torch.randn(state.adapter.flat.shape, generator=generator) * 0.02
    state.adapter.flat.add_(noise.to(state.adapter.flat.device))
    return state


def make_operation(lengths: tuple[int, ...], *, vocab_size: int, seed: int) -> ForwardBackward:
    """Random datums with random weights."""
    draw = np.random.default_rng(seed)
    data = []
    for length in lengths:
        inputs = {
            "target_tokens": draw.integers(vocab_size, size=length),
            "weights": draw.normal(size=length).astype(np.float32),
        }
        data.append(Datum(draw.integers(vocab_size, size=length), inputs))
    return ForwardBackward(tuple(data), "cross_entropy")
