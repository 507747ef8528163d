"""Reads a directory as a base model: which files are taken, and what its config and weights say.

Weights are safetensors only; code and pickles are never taken, whatever else lies in the directory.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from api.cli.errors import CliError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
TAKEN = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
"""File names that a base model may consist of; also what is asked of the hub."""
TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
OUTPUT_WEIGHT = "lm_head.weight"
_HEADER_BYTES_MAX = 100 * 2**20
_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}


@dataclass(frozen=True)
class ModelFacts:
    """What is registered of a base model; `files` by name, their sizes in bytes."""

    architecture: str
    dtype: str
    context_length: int
    vocab_size: int
    num_parameters: int
    tied_embeddings: bool
    files: Mapping[str, int]


def read_model(directory: Path) -> ModelFacts:
    """Check a directory and read what has to be known of it.

    Raises:
        CliError: it cannot be served; says what is missing or wrong.
    """
    config = _read_config(directory)
    weights = _weight_files(directory)
    if not any(all((directory / name).is_file() for name in names) for names in TOKENIZERS):
        expected = ", ".join(" + ".join(names) for names in TOKENIZERS)
        raise CliError(f"{directory} has no tokenizer: one of {expected} must lie in it")
    text = config.get("text_config", config)
    tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    return ModelFacts(
        architecture=_architecture(directory, config),
        dtype=_DTYPES.get(str(text.get("dtype") or text.get("torch_dtype") or config.get("dtype")), "float32"),
        context_length=_positive(directory, text, "max_position_embeddings"),
        vocab_size=_positive(directory, text, "vocab_size"),
        num_parameters=sum(_count_parameters(path, skip_output=tied) for path in weights),
        tied_embeddings=tied,
        files={path.name: path.stat().st_size for path in _taken(directory, weights)},
    )


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not path.is_file():
        raise CliError(f"{directory} is no model in the Hugging Face layout: it has no {CONFIG}")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CliError(f"{path} is not JSON: {error}") from error
    if config.get("quantization_config"):
        raise CliError(f"{directory} is quantized: take the float32 or bfloat16 weights of this model instead")
    return config


def _architecture(directory: Path, config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures") or [""]
    architecture = str(architectures[0])
    if not architecture.endswith("ForCausalLM"):
        raise CliError(
            f"{directory / CONFIG}: `architectures` is {architectures}; a causal language model "
            "(…ForCausalLM, e.g. Qwen3ForCausalLM or LlamaForCausalLM) is needed"
        )
    return architecture


def _positive(directory: Path, config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise CliError(f"{directory / CONFIG}: `{name}` must be a positive number, not {value!r}")
    return value


def _weight_files(directory: Path) -> Sequence[Path]:
    """Those that the index names, where there is one: a directory may hold the same weights in another cut too."""
    if (directory / INDEX).is_file():
        names = sorted(set(json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [directory / Path(name).name for name in names]
    else:
        paths = sorted(directory.glob("*.safetensors"))
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise CliError(f"{directory} lacks {', '.join(missing)}, which {INDEX} names: download the model again")
    if not paths:
        pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
        why = f"only {', '.join(pickles)}, which would run code when loaded; convert them" if pickles else "none at all"
        raise CliError(f"{directory} has no safetensors weights, {why}")
    return paths


def _taken(directory: Path, weights: Sequence[Path]) -> Iterator[Path]:
    for pattern in TAKEN:
        for path in sorted(directory.glob(pattern)):
            if path.is_file() and (path.suffix != ".safetensors" or path in weights):
                yield path


def _count_parameters(path: Path, *, skip_output: bool) -> int:
    """Numbers in a safetensors file, from its header alone."""
    header = _read_header(path)
    return sum(
        math.prod(tensor["shape"])
        for name, tensor in header.items()
        if name != "__metadata__" and not (skip_output and name == OUTPUT_WEIGHT)
    )


def _read_header(path: Path) -> dict[str, Any]:
    """A safetensors header: its length as a little-endian 64-bit number, then that much JSON."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > _HEADER_BYTES_MAX:
                raise ValueError(f"its header would have {size} bytes")
            header: dict[str, Any] = json.loads(file.read(size))
            last = max(tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__")
        if path.stat().st_size != 8 + size + last:
            raise ValueError(f"it has {path.stat().st_size} bytes instead of {8 + size + last}")
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise CliError(f"{path} is no whole safetensors file ({error}): download it again") from error
    return header
