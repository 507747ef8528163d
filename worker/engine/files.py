"""Safetensors with text beside the tensors; reading verifies before it trusts.

What is large is never joined: a file is written as pieces, and read from chunks straight to where its tensors belong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor

from worker.engine.errors import UnreadableStateError

FORMAT_VERSION = "1"
_HEADER_BYTES_MAX = 100_000_000  # safetensors' own limit
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """A safetensors file in pieces: its header, then the memory of each tensor, which must not change meanwhile.

    Args:
        tensors: on CPU, contiguous.
        metadata: text by name.

    Source: the format's description, huggingface/safetensors: README.md.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for name, tensor in tensors.items():
        place = [start, start + tensor.nbytes]
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        start += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *(_memory(tensor) for tensor in tensors.values())]


def write_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Bytes of a safetensors file; arguments as those of `write_pieces`."""
    return b"".join(write_pieces(tensors, metadata))


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


@dataclass(frozen=True)
class Header:
    """What a file says of itself before its numbers.

    Attributes:
        shapes: of its tensors, all fp32, in the order in which they lie.
    """

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]


def read_into(chunks: Iterable[bytes], choose: Callable[[Header], Mapping[str, Tensor]]) -> None:
    """Read an fp32 safetensors file from chunks straight into tensors.

    Args:
        chunks: the file, from its beginning.
        choose: given the header, says where each tensor goes: contiguous, on CPU, of the shape the header says.

    Raises:
        UnreadableStateError: this is no such file, or it is cut short, or too long.
    """
    stream = _ChunkStream(chunks)
    header = _read_header(stream)
    targets = choose(header)
    for name in header.shapes:
        stream.read_into(_memory(targets[name]))
    stream.expect_end()


def _read_header(stream: _ChunkStream) -> Header:
    length = int.from_bytes(stream.read(8), "little")
    if length > _HEADER_BYTES_MAX:
        raise UnreadableStateError(f"stored weights cannot be read as safetensors: a header of {length} bytes")
    try:
        entries = json.loads(stream.read(length))
        metadata = entries.pop("__metadata__", {})
        in_order = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
        shapes, start = {}, 0
        for name, entry in in_order:
            shape = tuple(int(size) for size in entry["shape"])
            if entry["dtype"] != "F32" or entry["data_offsets"] != [start, start + 4 * math.prod(shape)]:
                raise ValueError(f"tensor {name!r} is {entry}, at {start}")
            shapes[name] = shape
            start += 4 * math.prod(shape)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableStateError(f"stored weights cannot be read as safetensors: {error}") from error
    return Header(shapes, metadata)


def _memory(tensor: Tensor) -> memoryview:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


class _ChunkStream:
    """Bytes asked for in other sizes than they come."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks: Iterator[bytes] = iter(chunks)
        self._left: memoryview = memoryview(b"")

    def read(self, size: int) -> bytes:
        data = bytearray(size)
        self.read_into(memoryview(data))
        return bytes(data)

    def read_into(self, target: memoryview) -> None:
        filled = 0
        while filled < len(target):
            if not self._left:
                chunk = next(self._chunks, None)
                self._left = memoryview(chunk or b"")
                if not chunk:
                    raise UnreadableStateError("stored weights cannot be read as safetensors: the file ends too early")
            taken = min(len(self._left), len(target) - filled)
            target[filled : filled + taken] = self._left[:taken]
            self._left = self._left[taken:]
            filled += taken

    def expect_end(self) -> None:
        """Also lets the source of the chunks come to its end, where it may find that they are damaged."""
        rest = next(self._chunks, None)
        if self._left or rest:
            raise UnreadableStateError("stored weights cannot be read as safetensors: there are bytes after the last")


def check_metadata(metadata: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Compare what a file says of itself with what is wanted.

    Raises:
        UnreadableStateError: names the field, what the file says, and what is wanted.
    """
    for name, wanted in expected.items():
        if metadata.get(name) != wanted:
            raise UnreadableStateError(f"stored state has {name} {metadata.get(name)!r}, this run needs {wanted!r}")
