"""Whether the engine computes what a transformers model computes.

First its config is read for what packing cannot do; then, once it is wrapped, its own logits on two short sequences
must come out of one packed pass.
"""

# V vocabulary, N tokens of one sequence

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from worker.engine.attention import PackedAttention
from worker.engine.errors import UnsupportedModelError

if TYPE_CHECKING:
    from worker.engine.base_model import BaseModel

_LENGTHS = (5, 11)
_LAYERS = frozenset({"full_attention"})
_ROTARY = frozenset({"default", "linear", "llama3", "yarn"})
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
_COARSE_TOLERANCE = 0.2


def check_config(config: Any) -> None:
    """Refuse a model by its config.

    Raises:
        UnsupportedModelError: names what the engine cannot do.
    """
    reasons = []
    if getattr(config, "is_encoder_decoder", False):
        reasons.append("it is an encoder-decoder model")
    if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", False):
        reasons.append("its attention is not causal")
    layers = set(getattr(config, "layer_types", None) or _LAYERS)
    if layers - _LAYERS:
        reasons.append(f"it has layers of type {sorted(layers - _LAYERS)}")
    if _uses_sliding_window(config, layers):
        reasons.append("its attention has a sliding window")
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotary not in _ROTARY:
        reasons.append(f"its rotary embedding {rotary!r} depends on the longest sequence of a pass")
    if getattr(config, "quantization_config", None) is not None:
        reasons.append("its weights are quantized")
    if reasons:
        raise UnsupportedModelError(
            f"{config.model_type} cannot be used as a base model: {'; '.join(reasons)}. "
            "Choose a causal language model with full attention and unquantized weights"
        )


def _uses_sliding_window(config: Any, layers: set[str]) -> bool:
    if getattr(config, "layer_types", None) is not None:
        return "sliding_attention" in layers
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


@torch.no_grad()
def reference_logits(model: Any) -> list[Tensor]:
    """Logits `[N, V]` of the untouched model on two short sequences, each by itself."""
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UnsupportedModelError("the output projection has a bias; choose another base model")
    return [model(tokens[None].to(model.device)).logits[0].float() for tokens in _sequences(model.config.vocab_size)]


@torch.no_grad()
def check_reproduced(base_model: BaseModel, expected: list[Tensor]) -> None:
    """Compare a packed pass of the wrapped model with what the untouched model said.

    Raises:
        UnsupportedModelError: they differ by more than rounding.
    """
    hidden_TD = _hidden(base_model, _sequences(base_model.config.vocab_size))
    logits_TV, wanted_TV = base_model.logits(hidden_TD, []), torch.cat(expected)
    error = (torch.linalg.vector_norm(logits_TV - wanted_TV) / torch.linalg.vector_norm(wanted_TV)).item()
    if not error < _TOLERANCE.get(base_model.dtype, _COARSE_TOLERANCE):
        raise UnsupportedModelError(
            f"{base_model.name}: a packed pass gives other logits than the model itself (relative error {error:.1e}); "
            f"{base_model.config.model_type} does something the engine does not support. Choose another base model"
        )


@torch.no_grad()
def check_company(base_model: BaseModel) -> None:
    """Compare sequences' hidden states alone with those in company, bit for bit.

    Raises:
        UnsupportedModelError: they differ.
    """
    longer, company = _sequences(base_model.config.vocab_size)
    shorter = longer[:1]
    together_TD = _hidden(base_model, [company, longer, shorter])[len(company) :]
    alone_TD = torch.cat([_hidden(base_model, [longer]), _hidden(base_model, [shorter])])
    if not torch.equal(together_TD, alone_TD):
        raise UnsupportedModelError(
            f"{base_model.name}: a sequence has other bits alone than in company on {base_model.device}, so the "
            "deterministic setting cannot hold here: set PIECEWORK_DETERMINISTIC=off"
        )


def _hidden(base_model: BaseModel, sequences: list[Tensor]) -> Tensor:
    tokens_T = torch.cat(sequences).to(base_model.device)
    positions_T = torch.cat([torch.arange(len(tokens)) for tokens in sequences]).to(base_model.device)
    spans: list[tuple[int, int]] = []
    for tokens in sequences:
        start = spans[-1][1] if spans else 0
        spans.append((start, start + len(tokens)))
    attention = PackedAttention(spans, len(tokens_T))
    return base_model.hidden(tokens_T, positions_T, segments=[], attention=attention)


def _sequences(vocab_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (length,), generator=generator) for length in _LENGTHS]
