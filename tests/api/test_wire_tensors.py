"""Tensors of requests become dense arrays, and never more than their budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tinker.proto.request_conv import _tensor_data_to_proto
from tinker.types import TensorData

from api import tinker_public_pb2 as pb
from api.wire import tensors
from jobs.validation import InvalidOperationError


def ours(tensor: TensorData) -> pb.Tensor:
    """The SDK's own encoding of a tensor, read with our schema."""
    message = pb.Tensor()
    message.ParseFromString(_tensor_data_to_proto(tensor).SerializeToString())
    return message


def read(message: pb.Tensor, **kwargs: int) -> np.ndarray:
    return tensors.from_proto(message, "x", budget=tensors.CellBudget(), **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_dense_tensors_of_the_sdk_keep_dtype_and_shape(dtype: torch.dtype) -> None:
    given = torch.arange(6, dtype=dtype).reshape(2, 3)
    array = read(ours(TensorData.from_torch(given)))
    assert array.shape == (2, 3)
    assert array.dtype == (np.float32 if dtype == torch.float32 else np.int64)
    assert array.tolist() == given.tolist()


def test_sparse_tensors_of_the_sdk_become_dense() -> None:
    # given: a matrix that the SDK sends as CSR
    given = torch.zeros(8, 16)
    given[0, 3], given[5, 15], given[5, 0] = 1.5, -2.0, 0.25
    message = ours(TensorData.from_torch_sparse(given))
    assert message.WhichOneof("encoding") == "sparse_csr"
    # then
    assert read(message).tolist() == given.tolist()


def test_cells_that_a_sparse_tensor_does_not_list_take_the_fill() -> None:
    given = torch.full((4, 8), -1)
    given[2, 2] = 7
    message = ours(TensorData.from_torch_sparse(given, pad_value=-1))
    assert message.WhichOneof("encoding") == "sparse_csr"
    assert read(message, fill=-1).tolist() == given.tolist()


def test_an_absent_shape_is_one_dimension() -> None:
    assert read(pb.Tensor(dense=np.arange(3, dtype="<i8").tobytes(), dtype=pb.DTYPE_INT64)).shape == (3,)


def test_bfloat16_is_widened_exactly_and_int32_to_int64() -> None:
    bfloat16 = torch.tensor([1.0, -2.5, 0.1], dtype=torch.bfloat16)
    bits = bfloat16.view(torch.int16).numpy().astype("<i2").tobytes()
    assert read(pb.Tensor(dense=bits, dtype=pb.DTYPE_BFLOAT16)).tolist() == bfloat16.float().tolist()
    int32 = np.array([1, -1], dtype="<i4").tobytes()
    assert read(pb.Tensor(dense=int32, dtype=pb.DTYPE_INT32)).dtype == np.int64


def csr(crow: list[int], col: list[int], shape: list[int], values: int | None = None) -> pb.Tensor:
    count = len(col) if values is None else values
    return pb.Tensor(
        sparse_csr=pb.SparseCsr(
            values=np.ones(count, "<f4").tobytes(),
            crow_indices=np.array(crow, "<i8").tobytes(),
            col_indices=np.array(col, "<i8").tobytes(),
        ),
        dtype=pb.DTYPE_FLOAT32,
        shape=shape,
    )


@pytest.mark.parametrize(
    ("tensor", "complaint"),
    [
        (pb.Tensor(dense=b"123", dtype=pb.DTYPE_FLOAT32), "whole number of 4-byte"),
        (pb.Tensor(dense=b"1234", dtype=pb.DTYPE_UNSPECIFIED), "dtype 0"),
        (pb.Tensor(dense=b"1234", dtype=pb.DTYPE_FLOAT32, shape=[2, 2]), r"do not fill shape \[2, 2\]"),
        (pb.Tensor(dense=b"1234", dtype=pb.DTYPE_FLOAT32, shape=[-1]), "do not fill"),
        (csr([0, 1], [0], [1]), r"shape \[rows, columns\]"),
        (csr([0, 2, 1], [0], [2, 2]), "crow_indices"),
        (csr([0], [0], [1, 2]), "crow_indices"),
        (csr([0, 1], [2], [1, 2]), "col_indices"),
        (csr([0, 1], [-1], [1, 2]), "col_indices"),
        (csr([0, 2], [1, 1], [1, 2]), "listed twice"),
        (csr([0, 0], [], [1, 2**40]), "send fewer datums"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused_by_name(tensor: pb.Tensor, complaint: str) -> None:
    with pytest.raises(InvalidOperationError, match=complaint) as refused:
        read(tensor)
    assert str(refused.value).startswith("x")


def test_the_sparse_tensors_of_one_request_share_a_budget() -> None:
    budget = tensors.CellBudget(cells_max=10)
    tensors.from_proto(csr([0, 0], [], [1, 6]), "a", budget=budget)
    with pytest.raises(InvalidOperationError, match="10 cells together"):
        tensors.from_proto(csr([0, 0], [], [1, 6]), "b", budget=budget)


@pytest.mark.parametrize(
    ("tensor", "complaint"),
    [
        ([1, 2], "must be an object"),
        ({"data": [1], "dtype": "float16"}, "float16"),
        ({"data": [1, "2"], "dtype": "int64"}, r"\[1\]: '2'"),
        ({"data": [1.5], "dtype": "int64"}, r"\[0\]: 1.5"),
        ({"data": [True], "dtype": "int64"}, "True"),
        ({"data": [2**70], "dtype": "int64"}, "does not fit"),
        ({"data": [1], "dtype": "int64", "shape": ["1"]}, "list of integers"),
        ({"data": [1], "dtype": "int64", "shape": [1, 1], "sparse_crow_indices": [0, 1]}, "col_indices"),
    ],
)
def test_json_tensors_that_cannot_be_read_are_refused(tensor: object, complaint: str) -> None:
    with pytest.raises(InvalidOperationError, match=complaint):
        tensors.from_json(tensor, "x", budget=tensors.CellBudget())


def test_json_tensors_dense_and_sparse_are_read() -> None:
    budget = tensors.CellBudget()
    dense = tensors.from_json({"data": [1, 2.5], "dtype": "float32", "shape": None}, "x", budget=budget)
    assert dense.dtype == np.float32
    sparse = {
        "data": [5],
        "dtype": "int64",
        "shape": [2, 2],
        "sparse_crow_indices": [0, 0, 1],
        "sparse_col_indices": [1],
    }
    assert tensors.from_json(sparse, "x", budget=budget).tolist() == [[0, 0], [0, 5]]
