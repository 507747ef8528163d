"""Safetensors with text beside the tensors, as bytes; reading verifies before it trusts."""

from __future__ import annotations

import json
from collections.abc import Mapping

import safetensors.torch
from torch import Tensor

from worker.engine.errors import UnreadableStateError

FORMAT_VERSION = "1"


def write_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Bytes of a safetensors file.

    Args:
        tensors: on CPU, contiguous.
        metadata: text by name.
    """
    data: bytes = safetensors.torch.save(dict(tensors), metadata=dict(metadata))
    return data


def read_tensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        UnreadableStateError: the bytes are no such file, or are cut short.
    """
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
        header_bytes = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + header_bytes]).get("__metadata__", {})
    except Exception as error:
        raise UnreadableStateError(f"stored weights cannot be read as safetensors: {error}") from error
    return tensors, metadata


def check_metadata(metadata: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Compare what a file says of itself with what is wanted.

    Raises:
        UnreadableStateError: names the field, what the file says, and what is wanted.
    """
    for name, wanted in expected.items():
        if metadata.get(name) != wanted:
            raise UnreadableStateError(f"stored state has {name} {metadata.get(name)!r}, this run needs {wanted!r}")
