"""Tensors of requests, protobuf and JSON, to dense arrays.

What always holds: an array that leaves here has dtype int64 or float32 and the shape that was declared; a sparse tensor
cannot grow beyond the cells that its `CellBudget` has left, whatever shape it claims.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from api import tinker_public_pb2 as pb
from jobs.operations import Array
from jobs.validation.errors import InvalidOperationError

CELLS_MAX = 2**25
"""Cells that the sparse tensors of one request may have together once dense."""

_STORED: dict[int, str] = {
    pb.DTYPE_FLOAT32: "<f4",
    pb.DTYPE_INT64: "<i8",
    pb.DTYPE_INT32: "<i4",
    pb.DTYPE_BFLOAT16: "<u2",
}
_NAMED = {"float32": np.float32, "int64": np.int64}


class CellBudget:
    """How many cells the sparse tensors of one request may still fill."""

    def __init__(self, cells_max: int = CELLS_MAX) -> None:
        self._max = cells_max
        self._left = cells_max

    def take(self, cells: int, where: str) -> None:
        """Count `cells` more.

        Raises:
            InvalidOperationError: the request's sparse tensors are too large together.
        """
        if cells > self._left:
            raise InvalidOperationError(
                f"{where}: the sparse tensors of one request may have {self._max} cells together; send fewer datums"
            )
        self._left -= cells


def from_proto(tensor: pb.Tensor, where: str, *, budget: CellBudget, fill: int = 0) -> Array:
    """A protobuf `Tensor`, dense or CSR.

    Args:
        tensor: as the SDK sent it.
        where: name of the tensor for messages, e.g. `data[3].loss_fn_inputs['weights']`.
        budget: cells that sparse tensors may still fill.
        fill: value of the cells that a sparse tensor does not list.

    Returns:
        int64 for integers, float32 for floats (bfloat16 is widened exactly).

    Raises:
        InvalidOperationError: dtype, byte count, shape or indices do not fit together.
    """
    if tensor.dtype not in _STORED:
        raise InvalidOperationError(
            f"{where}: dtype {tensor.dtype} is not FLOAT32 (1), INT64 (2), INT32 (3), BFLOAT16 (4)"
        )
    shape = list(tensor.shape)
    if tensor.WhichOneof("encoding") != "sparse_csr":
        return _shaped(_values(tensor.dense, tensor.dtype, where), shape, where)
    csr = tensor.sparse_csr
    return _densify(
        _values(csr.values, tensor.dtype, where),
        _raw(csr.crow_indices, "<i8", f"{where}.crow_indices"),
        _raw(csr.col_indices, "<i8", f"{where}.col_indices"),
        shape,
        where,
        budget=budget,
        fill=fill,
    )


def from_json(tensor: Any, where: str, *, budget: CellBudget, fill: int = 0) -> Array:
    """A JSON `TensorData`: `{"data", "dtype", "shape"?, "sparse_crow_indices"?, "sparse_col_indices"?}`.

    Args, Returns, Raises: as of `from_proto`.
    """
    if not isinstance(tensor, Mapping) or "data" not in tensor:
        raise InvalidOperationError(f"{where}: must be an object with 'data' and 'dtype', got {type(tensor).__name__}")
    dtype = tensor.get("dtype")
    if dtype not in _NAMED:
        raise InvalidOperationError(f"{where}: dtype {dtype!r} is not one of {sorted(_NAMED)}")
    data = numbers(tensor["data"], dtype, f"{where}.data")
    shape = tensor.get("shape")
    if shape is not None and not (isinstance(shape, list) and all(type(size) is int for size in shape)):
        raise InvalidOperationError(f"{where}.shape: must be a list of integers, got {shape!r}")
    crow = tensor.get("sparse_crow_indices")
    if crow is None:
        return _shaped(data, shape or [], where)
    crow = numbers(crow, "int64", f"{where}.sparse_crow_indices")
    col = numbers(tensor.get("sparse_col_indices"), "int64", f"{where}.sparse_col_indices")
    return _densify(data, crow, col, shape or [], where, budget=budget, fill=fill)


def numbers(values: Any, dtype: str, where: str) -> Array:
    """A JSON list of numbers as a flat array of `dtype` (`int64` or `float32`).

    Raises:
        InvalidOperationError: not a flat list, or not numbers of that type.
    """
    if not isinstance(values, list):
        raise InvalidOperationError(f"{where}: must be a list of numbers, got {type(values).__name__}")
    allowed = (int,) if dtype == "int64" else (int, float)
    for index, value in enumerate(values):
        if type(value) not in allowed:
            raise InvalidOperationError(f"{where}[{index}]: {value!r} is not a number of type {dtype}")
    try:
        return np.array(values, dtype=_NAMED[dtype])
    except OverflowError as error:
        raise InvalidOperationError(f"{where}: a value does not fit into {dtype}") from error


def tokens_from_bytes(data: bytes, where: str) -> Array:
    """Token ids of a protobuf text chunk (int32, little-endian) as int64.

    Raises:
        InvalidOperationError: not a whole number of int32.
    """
    return _raw(data, "<i4", where).astype(np.int64)


def _raw(data: bytes, dtype: str, where: str) -> Array:
    size = np.dtype(dtype).itemsize
    if len(data) % size:
        raise InvalidOperationError(f"{where}: {len(data)} bytes are not a whole number of {size}-byte values")
    return np.frombuffer(data, dtype=dtype)


def _values(data: bytes, dtype: int, where: str) -> Array:
    values = _raw(data, _STORED[dtype], where)
    if dtype == pb.DTYPE_BFLOAT16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.int64 if dtype == pb.DTYPE_INT32 else values.dtype.newbyteorder("="))


def _shaped(values: Array, shape: Sequence[int], where: str) -> Array:
    if not shape:
        return values
    if min(shape) < 0 or math.prod(shape) != values.size:
        raise InvalidOperationError(f"{where}: {values.size} values do not fill shape {list(shape)}")
    return values.reshape(shape)


def _densify(
    values: Array, crow: Array, col: Array, shape: Sequence[int], where: str, *, budget: CellBudget, fill: int
) -> Array:
    if len(shape) != 2 or min(shape) < 0:
        raise InvalidOperationError(f"{where}: a sparse tensor has shape [rows, columns], got {list(shape)}")
    rows, columns = shape
    if crow.size != rows + 1 or crow[0] != 0 or crow[-1] != values.size or np.any(np.diff(crow) < 0):
        raise InvalidOperationError(
            f"{where}: crow_indices must be {rows + 1} non-decreasing numbers, 0 to {values.size}"
        )
    if col.size != values.size or (col.size and (col.min() < 0 or col.max() >= columns)):
        raise InvalidOperationError(f"{where}: col_indices must be {values.size} numbers from 0 to {columns - 1}")
    budget.take(rows * columns, where)
    flat = np.repeat(np.arange(rows, dtype=np.int64), np.diff(crow)) * columns + col
    if np.unique(flat).size != flat.size:
        raise InvalidOperationError(f"{where}: a cell is listed twice")
    dense = np.full(rows * columns, fill, dtype=values.dtype)
    dense[flat] = values
    return dense.reshape(rows, columns)
