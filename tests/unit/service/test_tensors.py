"""The protocol's tensors at their edges."""

import math
import struct
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from service.errors import InvalidInput, TooLarge
from service.manifest import Datatype, TensorSpec
from service.tensors import check_tensor, from_bytes, from_values, to_bytes

PIXELS = TensorSpec(name="images", datatype="UINT8", shape=(-1, 2, 3))
COMPONENTS = TensorSpec(name="digit_capsules", datatype="FP32", shape=(-1, 2))
TARGET = TensorSpec(name="target", datatype="INT64", shape=(-1,))


@pytest.mark.parametrize("data", [[1, 2, 3, 4, 5, 6], [[[1, 2, 3], [4, 5, 6]]]])
def test_numbers_may_be_flat_or_nested_to_the_shape(data: list[Any]) -> None:
    """Both are row-major and give the same array."""
    array = from_values(PIXELS, (1, 2, 3), data)
    assert array.dtype == np.uint8
    assert array.tolist() == [[[1, 2, 3], [4, 5, 6]]]


@pytest.mark.parametrize(
    ("data", "received"),
    [
        ([1, 2, 3, 4, 5], "5 values"),
        ([], "0 values"),
        ([[1, 2, 3], [4, 5, 6]], r"lists nested to \[2, 3\]"),
        ([[[1, 2], [3, 4], [5, 6]]], r"lists nested to \[1, 3, 2\]"),
        ([[[1, 2, 3], [4, 5]]], "2 to 3 values in lists 2 deep"),
        ([[[1, 2, 3], 4]], "0 to 3 values in lists 2 deep"),
        ([[[[1], 2, 3], [4, 5, 6]]], "a list"),
        ([[], [], []], r"lists nested to \[3, 0\]"),
    ],
)
def test_data_of_another_form_is_refused(data: list[Any], received: str) -> None:
    """Too few values, another nesting, an uneven one."""
    with pytest.raises(InvalidInput) as caught:
        from_values(PIXELS, (1, 2, 3), data)
    assert caught.value.received is not None
    assert any(part in caught.value.received for part in received.replace("\\", "").split("|"))


def test_deep_nesting_is_walked_no_deeper_than_the_shape() -> None:
    """A list of a thousand levels is refused as one value that is no number."""
    data: list[Any] = [1]
    for _ in range(1000):
        data = [data]
    with pytest.raises(InvalidInput, match="not all of its datatype"):
        from_values(TensorSpec(name="x", datatype="UINT8", shape=(-1, 1)), (1, 1), data)


@pytest.mark.parametrize("value", [256, -1, 1 << 70, 1 << 200])
def test_a_number_beyond_its_datatype_is_refused(value: int) -> None:
    """It does not wrap around; the error says which, and what there may be."""
    with pytest.raises(InvalidInput, match="does not fit its datatype") as caught:
        from_values(PIXELS, (1, 2, 3), [255, value, 0, 0, 0, 0])
    assert (caught.value.received, caught.value.expected) == (str(value)[:50], "0 to 255")
    with pytest.raises(InvalidInput) as caught:
        from_values(COMPONENTS, (1, 2), [0.5, 10**400])
    assert caught.value.received == "1" + "0" * 49
    assert caught.value.expected == "-3.4028234663852886e+38 to 3.4028234663852886e+38"


@pytest.mark.parametrize(
    ("datatype", "values"),
    [("UINT8", array("I", [256])), ("UINT8", array("q", [-1])), ("INT64", array("Q", [1 << 63]))],
)
def test_no_container_makes_numbers_wrap_around(datatype: Datatype, values: Sequence[int]) -> None:
    """Also what numpy would take as an array of another type is read number by number."""
    with pytest.raises(InvalidInput, match="does not fit its datatype"):
        from_values(TensorSpec(name="x", datatype=datatype, shape=(-1,)), (1,), values)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1.0, "a number with a decimal point"),
        (1.5, "a number with a decimal point"),
        (True, "a truth value"),
        ("1", "a text"),
        (None, "null"),
        ({}, "an object"),
        ([1], "a list"),
    ],
)
def test_nothing_but_whole_numbers_is_taken_for_integers(value: Any, said: str) -> None:
    """Neither truth values nor fractions, texts or nothing become numbers in silence."""
    with pytest.raises(InvalidInput) as caught:
        from_values(TARGET, (2,), [1, value])
    assert caught.value.received == said


def test_integers_keep_every_bit() -> None:
    """The ends of INT64 arrive as they are, not by way of a double."""
    ends = [-(1 << 63), (1 << 63) - 1]
    assert from_values(TARGET, (2,), ends).tolist() == ends


def test_whole_numbers_are_numbers_too() -> None:
    """JSON writes 1.0 as 1, and FP32 takes both."""
    assert from_values(COMPONENTS, (1, 2), [1, 0.5]).tolist() == [[1.0, 0.5]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    """In JSON as in bytes, and also what only single precision cannot hold."""
    with pytest.raises(InvalidInput, match="not finite"):
        from_values(COMPONENTS, (1, 2), [0.0, value])
    if abs(value) != 1e39:
        with pytest.raises(InvalidInput, match="not finite"):
            from_bytes(COMPONENTS, (1, 2), struct.pack("<2f", 0, value))


def test_a_long_text_among_numbers_takes_no_memory_of_its_length() -> None:
    """An array of texts would take four times the longest for each element."""
    with pytest.raises(InvalidInput, match="not all of its datatype"):
        from_values(TARGET, (100_000,), ["x" * 1_000_000] + [""] * 99_999)


def test_raw_tensors_are_little_endian_and_row_major() -> None:
    """The bytes are those that the protocol prescribes, on any machine."""
    assert from_bytes(TARGET, (2,), b"\x01" + bytes(7) + b"\xfe" + b"\xff" * 7).tolist() == [1, -2]
    assert to_bytes(np.array([[1.0, -2.0]], np.float32)) == struct.pack("<2f", 1, -2)
    assert to_bytes(np.array([[1, 2], [3, 4]], ">i8")) == struct.pack("<4q", 1, 2, 3, 4)


def test_a_raw_tensor_that_lies_askew_is_aligned() -> None:
    """ONNX Runtime reads whole words from where an array begins."""
    body = b"x" + struct.pack("<2f", 1, 2)
    array = from_bytes(COMPONENTS, (1, 2), memoryview(body)[1:])
    assert array.flags.aligned
    assert array.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("length", [0, 5, 7])
def test_raw_data_of_another_length_is_refused(length: int) -> None:
    """One byte too few is as wrong as one too many."""
    with pytest.raises(InvalidInput) as caught:
        from_bytes(PIXELS, (1, 2, 3), bytes(length))
    assert caught.value.received == f"{length} bytes"
    assert caught.value.expected == "6 bytes for UINT8 [1, 2, 3]"


def test_the_declared_shape_is_checked_against_the_metadata() -> None:
    """The batch axis is free from one to the limit, the others are not."""
    assert check_tensor(PIXELS, "UINT8", [4, 2, 3], max_rows=4) == (4, 2, 3)
    with pytest.raises(TooLarge) as caught:
        check_tensor(PIXELS, "UINT8", [5, 2, 3], max_rows=4)
    assert (caught.value.received, caught.value.expected) == ("5", "at most 4")


@pytest.mark.parametrize(
    "shape",
    [[], [2, 3], [0, 2, 3], [-1, 2, 3], [1, 3, 2], [1, 3, 3], [1, 2, 4], [1, 2, 3, 1], [1 << 64, 1, 1]],
)
def test_another_shape_is_refused(shape: list[int]) -> None:
    """Also an empty batch, a negative one, and another number of axes."""
    with pytest.raises(InvalidInput) as caught:
        check_tensor(PIXELS, "UINT8", shape, max_rows=4)
    assert caught.value.received == str(shape)


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP32", "INT8", "BOOL", "BYTES", "uint8", "", "x" * 99])
def test_another_datatype_is_refused(datatype: str) -> None:
    """No datatype is converted to another, and a long one is not repeated whole."""
    with pytest.raises(InvalidInput) as caught:
        check_tensor(PIXELS, datatype, [1, 2, 3], max_rows=4)
    assert (caught.value.received, caught.value.expected) == (repr(datatype[:20]), "UINT8")
