"""Which run and `seq` a training request belongs to, read even when the rest of it cannot be.

A training request that is too large or damaged is still accepted, as a failed operation: otherwise its `seq` would be a
gap, and all later operations of the run would wait for it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

HEAD_BYTES = 65_536
"""So much of the beginning (and, for JSON, of the end) of a body is kept to find its address."""

_MODEL_ID = re.compile(rb'"model_id"\s*:\s*("(?:[^"\\]|\\.)*")')
_SEQ_ID = re.compile(rb'"seq_id"\s*:\s*(\d{1,18})(?![\d.eE])')
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SEQ_MAX = 2**31 - 1


@dataclass(frozen=True)
class Address:
    """Run (`model_id` on the wire) and `seq` (`seq_id`) of a training request."""

    run_id: str
    seq: int


def from_protobuf(data: bytes) -> Address | None:
    """The address in a `ForwardBackwardRequest`, which may be cut off or damaged after it.

    Args:
        data: the message or its beginning; fields other than 1 (`model_id`) and 2 (`seq_id`) are skipped, not read.

    Returns:
        None if the two fields are not in `data`.
    """
    run_id: str | None = None
    seq: int | None = None
    position = 0
    while position < len(data) and (run_id is None or seq is None):
        try:
            tag, position = _varint(data, position)
            field, wire_type = tag >> 3, tag & 7
            value, end = _field(data, position, wire_type)
            if field == 1 and wire_type == _BYTES:
                run_id = data[value:end].decode() if end <= len(data) else None
            elif field == 2 and wire_type == _VARINT:
                seq = value
        except ValueError:  # also UnicodeDecodeError
            return None
        position = end
    return Address(run_id, seq) if run_id and seq is not None and seq <= _SEQ_MAX else None


def from_json(head: bytes, tail: bytes) -> Address | None:
    """The address in the beginning and the end of a JSON body.

    Returns:
        None if `model_id` or `seq_id` is in neither.
    """
    run_id, seq = _last(_MODEL_ID, head, tail), _last(_SEQ_ID, head, tail)
    if run_id is None or seq is None:
        return None
    try:
        return Address(json.loads(run_id), int(seq))
    except ValueError:
        return None


def _last(pattern: re.Pattern[bytes], head: bytes, tail: bytes) -> bytes | None:
    found = pattern.findall(tail) or pattern.findall(head)
    return found[-1] if found else None


def _field(data: bytes, position: int, wire_type: int) -> tuple[int, int]:
    """Value (of a varint) or start (of bytes), and where the next field begins."""
    if wire_type == _VARINT:
        return _varint(data, position)
    if wire_type == _BYTES:
        size, start = _varint(data, position)
        return start, start + size
    if wire_type in (_FIXED64, _FIXED32):
        return position, position + (8 if wire_type == _FIXED64 else 4)
    raise ValueError(f"wire type {wire_type} is not of proto3")


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data) and shift < 64:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError("the varint does not end")
