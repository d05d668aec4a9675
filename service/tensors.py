"""Tensors of the Open Inference Protocol to arrays and back: from JSON values, from raw bytes.

Nothing is converted in silence: a tensor is taken when its datatype, shape and values are what the model's
metadata says, and refused otherwise. Plain Python, shared by every way in that speaks the protocol.
"""

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidInput, TooLarge
from service.manifest import Datatype, TensorSpec

Array = NDArray[Any]

# Raw tensors are little-endian and row-major, without padding, whatever the machine.
_RAW: dict[Datatype, np.dtype[Any]] = {
    "UINT8": np.dtype("u1"),
    "INT64": np.dtype("<i8"),
    "FP32": np.dtype("<f4"),
}

# What errors call values that are no numbers of a datatype.
_KINDS = {
    float: "a number with a decimal point",
    bool: "a truth value",
    str: "a text",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def check_tensor(spec: TensorSpec, datatype: str, shape: Sequence[int], max_rows: int) -> tuple[int, ...]:
    """The declared shape, once it is known to be one that the model takes.

    Args:
        spec: what the model's metadata says of the tensor; -1 is its free batch axis.
        datatype: the declared element type.
        shape: the declared shape, whose first axis is the batch.
        max_rows: the largest batch of one request.

    Raises:
        InvalidInput: another datatype, another shape, or an empty batch.
        TooLarge: more rows than one request may have.
    """
    if datatype != spec.datatype:
        raise InvalidInput(
            f"The tensor {spec.name!r} has another datatype.",
            received=repr(datatype[:20]),
            expected=spec.datatype,
        )
    declared = tuple(shape)
    if len(declared) != len(spec.shape) or declared[1:] != spec.shape[1:] or declared[0] < 1:
        raise InvalidInput(
            f"The tensor {spec.name!r} has another shape.",
            received=str(list(declared))[:100],
            expected=f"{list(spec.shape)} with at least one row in place of -1",
        )
    if declared[0] > max_rows:
        raise TooLarge(
            f"The tensor {spec.name!r} has too many rows.",
            received=str(declared[0]),
            expected=f"at most {max_rows}",
        )
    return declared


def from_bytes(spec: TensorSpec, shape: tuple[int, ...], data: bytes | memoryview) -> Array:
    """An array of `shape` from a raw tensor; not copied unless it lies askew in memory.

    Raises:
        InvalidInput: the bytes are more or fewer than the shape needs, or a value is not finite.
    """
    dtype = _RAW[spec.datatype]
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise InvalidInput(
            f"The raw data of the tensor {spec.name!r} does not match its shape.",
            received=f"{len(data)} bytes",
            expected=f"{expected} bytes for {spec.datatype} {list(shape)}",
        )
    raw = np.frombuffer(data, dtype).reshape(shape)
    return _finite(spec, np.require(raw, dtype.newbyteorder("="), ["ALIGNED", "C_CONTIGUOUS"]))


def from_values(spec: TensorSpec, shape: tuple[int, ...], data: Sequence[Any]) -> Array:
    """An array of `shape` from numbers as JSON has them: flat in row-major order, or nested to the shape.

    Flat ones may come in any container, and are checked alike.

    Raises:
        InvalidInput: not that many numbers, unevenly nested, not of the datatype, or not finite.
    """
    # A list, which numpy reads number by number. What it takes for an array (a repeated field of protobuf's)
    # it would convert as a whole, and 300 would be the byte 44 in silence.
    values = list(_flatten(spec, shape, data))
    numbers = {int, float} if spec.datatype == "FP32" else {int}
    strangers = set(map(type, values)) - numbers
    if strangers:
        raise InvalidInput(
            f"The data of the tensor {spec.name!r} are not all of its datatype.",
            received=" and ".join(sorted(_KINDS[kind] for kind in strangers)),
            expected=f"numbers of {spec.datatype}",
        )
    dtype = _RAW[spec.datatype].newbyteorder("=")
    # A double beyond single precision becomes infinite, which `_finite` refuses in words for the caller.
    with np.errstate(over="ignore"):
        try:
            return _finite(spec, np.array(values, dtype).reshape(shape))
        except OverflowError as error:
            limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
            low, high = dtype.type(limits.min).item(), dtype.type(limits.max).item()
            raise InvalidInput(
                f"A value of the tensor {spec.name!r} does not fit its datatype.",
                received=next(str(value)[:50] for value in values if not low <= value <= high),
                expected=f"{low} to {high}",
            ) from error


def to_bytes(array: Array) -> bytes:
    """A raw tensor."""
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _flatten(spec: TensorSpec, shape: tuple[int, ...], data: Sequence[Any]) -> Sequence[Any]:
    """The values in row-major order, once they are known to be flat or nested to the shape."""
    count = math.prod(shape)
    found = [len(data)]
    values = data
    while len(found) < len(shape) and any(isinstance(value, list) for value in values):
        sizes = {len(value) if isinstance(value, list) else 0 for value in values}
        if len(sizes) > 1:
            raise InvalidInput(
                f"The data of the tensor {spec.name!r} are nested unevenly.",
                received=f"{min(sizes)} to {max(sizes)} values in lists {len(found)} deep",
                expected=f"{count} numbers, or lists nested to {list(shape)}",
            )
        found.append(sizes.pop())
        values = list(chain.from_iterable(values))
    if found not in ([count], list(shape)):
        raise InvalidInput(
            f"The data of the tensor {spec.name!r} do not match its shape.",
            received=f"{found[0]} values" if len(found) == 1 else f"lists nested to {found}",
            expected=f"{count} numbers, or lists nested to {list(shape)}",
        )
    return values


def _finite(spec: TensorSpec, array: Array) -> Array:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidInput(
            f"The tensor {spec.name!r} holds values that are not finite.",
            received="NaN or infinity",
            expected="finite numbers",
        )
    return array
