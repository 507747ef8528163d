"""What is known of a base model when an operation is accepted, and what may be adapted on it."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.operations import LoraConfig
from jobs.validation.errors import InvalidOperationError
from jobs.validation.numbers import check_integer

RANK_MAX = 256
OPTIMIZERS = ("adamw",)


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a base model that bound what operations on it may ask.

    Attributes:
        name: what clients call it.
        vocab_size: token ids are 0 to `vocab_size - 1`.
        context_length: longest sequence, in tokens.
    """

    name: str
    vocab_size: int
    context_length: int


def check_lora(lora: LoraConfig) -> None:
    """Refuse an adapter that cannot be made."""
    check_integer(lora.rank, "lora_config.rank", 1, RANK_MAX)
    if not (lora.train_attn or lora.train_mlp or lora.train_unembed):
        raise InvalidOperationError(
            "lora_config: train_attn, train_mlp and train_unembed are all false; at least one must be true"
        )


def check_optimizer(family: str) -> None:
    """Refuse an optimizer family that is not served."""
    if family not in OPTIMIZERS:
        raise InvalidOperationError(f"optimizer_config.type: {family!r} is not supported; it must be 'adamw'")
