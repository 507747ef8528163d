"""Tiny random base models of each supported architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from worker.engine.base_model import BaseModel

ARCHITECTURES = ("qwen3", "llama", "qwen3_moe")
VOCAB_SIZE = 96

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
    "initializer_range": 0.3,
    "pad_token_id": None,
}


def make_config(architecture: str, **changes: Any) -> Any:
    """A config small enough for milliseconds; weights large enough for logits that differ."""
    common = {**_COMMON, "tie_word_embeddings": False, **changes}
    if architecture == "qwen3":
        return Qwen3Config(**common)
    if architecture == "llama":
        return LlamaConfig(**common)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
    return Qwen3MoeConfig(**{**experts, "norm_topk_prob": True, **common})


def make_model(architecture: str, **changes: Any) -> Any:
    """A plain transformers model in fp32; the same numbers on every call."""
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(make_config(architecture, **changes), dtype=torch.float32).eval()


def make_base_model(architecture: str, **changes: Any) -> BaseModel:
    """The same model as `make_model`, taken over by the engine."""
    return BaseModel(make_model(architecture, **changes), name=f"tiny/{architecture}", eos_token_ids=(1,))


def save_model(directory: Path, architecture: str, **changes: Any) -> Path:
    """The same model as `make_model`, in a directory."""
    make_model(architecture, **changes).save_pretrained(directory)
    return directory
