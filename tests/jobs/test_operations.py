"""Bodies and outcomes come back from their bytes as they were; anything else is refused in one way."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jobs import operations
from jobs.operations import (
    Datum,
    Failure,
    ForwardBackward,
    ForwardBackwardOutcome,
    Kind,
    Loaded,
    LoadState,
    ModelCreated,
    OptimStep,
    OptimStepOutcome,
    Sample,
    SampledSequence,
    SampleOutcome,
    SamplingParams,
    Saved,
    SaveState,
    UnreadableOperationError,
    decode,
    encode,
)
from tests.factories import make_forward_backward, make_lora, make_sample_body

HOSTILE_KEYS = ["$type", "$array", "$tuple", "$map", "v", "value", "", "\x00", "name", "__class__", "é", "\U0001f9ea"]
texts = st.one_of(st.sampled_from(HOSTILE_KEYS), st.text(max_size=20))
metadata = st.dictionaries(texts, texts, max_size=5)
numbers = st.floats(allow_nan=False)


def arrays_of(dtype: type, dimensions: int = 2) -> st.SearchStrategy[Any]:
    shapes = arrays.array_shapes(min_dims=1, max_dims=dimensions, min_side=0, max_side=5)
    return arrays.arrays(dtype, shapes)


data = st.builds(
    Datum,
    arrays_of(np.int64, 1),
    st.dictionaries(texts, st.one_of(arrays_of(np.float32), arrays_of(np.int64), arrays_of(np.float64)), max_size=3),
)
stops = st.one_of(st.none(), st.lists(st.text(max_size=5), max_size=3).map(tuple), st.just((5, 7)))
sequences = st.builds(
    SampledSequence,
    arrays_of(np.int32, 1),
    arrays_of(np.float32, 1),
    st.booleans(),
    st.one_of(st.none(), arrays_of(np.int32)),
    st.one_of(st.none(), arrays_of(np.float32)),
)
values = st.one_of(
    st.builds(
        ForwardBackward,
        st.lists(data, max_size=3).map(tuple),
        texts,
        st.dictionaries(texts, st.one_of(numbers, texts), max_size=3),
        st.booleans(),
    ),
    st.builds(OptimStep, learning_rate=numbers, grad_clip_norm=numbers),
    st.builds(SaveState, texts, st.one_of(st.none(), st.integers(0, 2**60)), st.booleans(), metadata),
    st.builds(LoadState, texts, st.booleans(), st.one_of(st.none(), texts)),
    st.builds(
        Sample,
        arrays_of(np.int64, 1),
        params=st.builds(SamplingParams, seed=st.integers(0, 2**63 - 1), stop=stops),
        target_prompt_logprobs=st.one_of(st.none(), arrays_of(np.int64)),
    ),
    st.builds(Failure, texts),
    st.builds(
        ForwardBackwardOutcome, st.lists(arrays_of(np.float32), max_size=3).map(tuple), st.just({"loss:sum": 1.5})
    ),
    st.builds(OptimStepOutcome, st.dictionaries(texts, numbers, max_size=3)),
    st.builds(Saved, texts),
    st.builds(
        SampleOutcome, st.lists(sequences, max_size=2).map(tuple), st.one_of(st.none(), arrays_of(np.float32, 1))
    ),
)


def same(a: Any, b: Any) -> bool:
    """Equal in type, shape and bits, all the way down."""
    if isinstance(a, str):
        return bool(a == b)  # a category may come back as its text
    if type(a) is not type(b):
        return False
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same(one, other) for one, other in zip(a, b, strict=True))
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


@settings(deadline=None, max_examples=150)
@given(values)
def test_what_was_encoded_is_what_is_decoded(value: Any) -> None:
    assert same(decode(encode(value)), value)


@settings(deadline=None, max_examples=300)
@given(values, st.data())
def test_damaged_bytes_are_unreadable_or_an_operation_and_nothing_else(value: Any, drawn: st.DataObject) -> None:
    # Given
    damaged = bytearray(encode(value))
    for _ in range(drawn.draw(st.integers(1, 3))):
        damaged[drawn.draw(st.integers(0, len(damaged) - 1))] = drawn.draw(st.integers(0, 255))
    end = drawn.draw(st.integers(0, len(damaged)))
    # When
    try:
        read = decode(bytes(damaged[:end]))
    except UnreadableOperationError:
        return
    # Then
    assert dataclasses.is_dataclass(read)


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=200))
def test_any_bytes_are_unreadable_and_nothing_else(noise: bytes) -> None:
    with pytest.raises(UnreadableOperationError):
        decode(noise)


@pytest.mark.parametrize(
    "plain",
    [
        5,
        None,
        "text",
        {"$tuple": [1]},
        {"$map": [["a", 1]]},
        {"$type": "Database"},
        {"$type": "ForwardBackward"},
        {"$type": ["unhashable"]},
        {"$array": ["<f4", [2], b"\x00"]},
        {"$array": ["<f4", [-1, -1], b"\x00" * 8]},
        {"$array": ["|O8", [1], b"\x00" * 8]},
        {"neither": 1},
    ],
)
def test_well_formed_bytes_that_hold_no_operation_are_unreadable(plain: Any) -> None:
    with pytest.raises(UnreadableOperationError):
        decode(msgpack.packb({"v": 1, "value": plain}))


def test_bytes_nested_very_deep_are_unreadable() -> None:
    with pytest.raises(UnreadableOperationError):
        decode(b"\x82\xa1v\x01\xa5value" + b"\x81\xa6$tuple\x91" * 100_000 + b"\xc0")


def test_a_later_format_says_so() -> None:
    with pytest.raises(UnreadableOperationError, match="has format 2, this release reads 1"):
        decode(msgpack.packb({"v": 2, "value": {"$type": "OptimStep"}}))


def test_a_field_of_a_later_release_is_passed_over() -> None:
    # Given
    plain = {"$type": "Loaded", "run_id": "r", "path": "p", "added_later": 1}
    # Then
    assert decode(msgpack.packb({"v": 1, "value": plain})) == Loaded("r", "p")


def test_a_field_that_an_earlier_release_did_not_write_has_its_default() -> None:
    assert decode(msgpack.packb({"v": 1, "value": {"$type": "OptimStep", "beta1": 0.5}})) == OptimStep(beta1=0.5)


def test_arrays_of_other_types_are_not_stored() -> None:
    with pytest.raises(TypeError, match="c16"):
        encode(ForwardBackwardOutcome((np.zeros(2, dtype=np.complex128),), {}))


def test_big_endian_and_strided_arrays_come_back_with_the_same_numbers() -> None:
    # Given
    array = np.arange(12, dtype=">i4").reshape(3, 4)[::2, ::-1]
    # When
    (read,) = decode(encode(ForwardBackwardOutcome((array,), {}))).logprobs
    # Then
    np.testing.assert_array_equal(read, array)
    assert read.dtype == np.dtype("<i4")


def test_every_kind_of_body_names_itself() -> None:
    assert make_forward_backward().kind is Kind.FORWARD_BACKWARD
    assert make_forward_backward(forward_only=True).kind is Kind.FORWARD
    assert make_sample_body().kind is Kind.SAMPLE
    assert operations.CreateModel("m", make_lora()).kind is Kind.CREATE_MODEL
    assert decode(encode(ModelCreated("r"))) == ModelCreated("r")


def test_tokens_of_all_datums_are_counted() -> None:
    assert make_forward_backward(num_data=3).num_tokens == 12
