"""What a protobuf message would become, judged by its bytes before it is parsed. See docs/decisions/0013."""

from dataclasses import dataclass
from functools import cache

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from service.errors import TooLarge

# Of all depths; a message with many parameters has a hundred. One may take two bytes, and become a hundred.
MAX_FIELDS = 512

# Bytes that hold no more fields than that, nor a long list, and so need not be looked at.
_SHORT = 2 * MAX_FIELDS

# A varint's bytes at most, seven bits in each.
_LONGEST_VARINT = 10

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class _Form:
    """The fields of a message, by number, that are looked into."""

    messages: dict[int, "_Form"]
    integers: frozenset[int]
    """Those of 64 bits. Packed, each may take one byte, and becomes eight."""


def check_size(message: type[Message], data: bytes, max_rows: int) -> None:
    """Refuse bytes that would become far more than they are, at a cost that does not grow with them.

    What passes may become four times as large, where its contents are small numbers of 32 bits.

    Args:
        message: what they are to be parsed as.
        data: the bytes of one message.
        max_rows: the largest batch of one request, and so the most 64-bit integers that a tensor has.

    Raises:
        TooLarge: too many fields, or too long a list of 64-bit integers.
        DecodeError: they are no message, or hold a group, which proto3 does not have. Not all that are none.
    """
    if len(data) <= _SHORT:
        return
    longest = max(_SHORT, _LONGEST_VARINT * max_rows)
    try:
        _count(data, 0, len(data), _form(message.DESCRIPTOR), MAX_FIELDS, longest)
    except IndexError as error:
        raise DecodeError("it ends within a field") from error


@cache
def _form(descriptor: Descriptor) -> _Form:
    """Of a message that does not hold itself."""
    wide = (FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_UINT64)
    return _Form(
        {field.number: _form(field.message_type) for field in descriptor.fields if field.message_type},
        frozenset(field.number for field in descriptor.fields if field.type in wide),
    )


def _count(data: bytes, position: int, end: int, form: _Form, left: int, longest: int) -> int:
    """How many fields are left to a message after this part of it."""
    while position < end:
        if not left:
            raise TooLarge(
                "The message has too many fields.",
                received=f"more than {MAX_FIELDS}",
                expected=f"at most {MAX_FIELDS}, with lists of numbers packed into one",
            )
        left -= 1
        tag, position = _varint(data, position)
        number, kind = tag >> 3, tag & 7
        if kind == _LENGTH:
            length, position = _varint(data, position)
            if length > end - position:
                raise DecodeError("a field is longer than what it is in")
            if number in form.messages:
                left = _count(data, position, position + length, form.messages[number], left, longest)
            elif number in form.integers and length > longest:
                raise TooLarge(
                    "A list of 64-bit integers in the message is too long.",
                    received=f"{length} bytes",
                    expected=f"at most {longest} bytes",
                )
            position += length
        elif kind == _VARINT:
            _, position = _varint(data, position)
        elif kind == _EIGHT_BYTES:
            position += 8
        elif kind == _FOUR_BYTES:
            position += 4
        else:
            raise DecodeError("a field is of no kind that proto3 has")
    return left


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A varint and the position after it."""
    if (value := data[position]) < 0x80:  # nearly all
        return value, position + 1
    value = 0
    for shift in range(0, 7 * _LONGEST_VARINT, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise DecodeError("a number is longer than any")
