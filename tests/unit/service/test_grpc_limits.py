"""What a message may become, with the messages of Triton's client: ours cannot be in a process with them."""

import pytest
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from service.errors import TooLarge
from service.grpc_limits import MAX_FIELDS, check_size

ROWS = 1024
Request = service_pb2.ModelInferRequest


def within(*numbers: int, content: bytes) -> bytes:
    """Content in length-delimited fields of these numbers, the first outermost."""
    for number in reversed(numbers):
        length, size = len(content), b""
        while length > 0x7F:
            length, size = length >> 7, size + bytes([length & 0x7F | 0x80])
        content = bytes([number << 3 | 2]) + size + bytes([length]) + content
    return content


@pytest.mark.parametrize(
    ("unit", "places"),
    [
        (b"\x22\x00", ()),  # parameters
        (b"\x2a\x00", ()),  # inputs
        (b"\x32\x00", ()),  # outputs
        (b"\x3a\x00", ()),  # raw_input_contents
        (b"\x78\x00", ()),  # a field that is not known
        (b"\x12\x00", (4,)),  # a parameter's value, again and again
        (b"\x18\x01", (5,)),  # an input's shape, unpacked
        (b"\x22\x00", (5,)),  # an input's parameters
        (b"\x22\x00", (5, 4, 2)),  # what is not known within one
        (b"\x2a\x00", (5,)),  # an input's contents, again and again
        (b"\x42\x00", (5, 5)),  # bytes_contents
        (b"\x20\x01", (5, 5)),  # uint_contents, unpacked
        (b"\x12\x00", (6,)),  # an output's parameters
        (b"\x2a\x02\x2a\x00", ()),  # inputs with contents
        (b"\x0d\x00\x00\x00\x00\x09" + bytes(8), ()),  # of four and of eight bytes
    ],
)
def test_fields_are_counted_at_every_depth(unit: bytes, places: tuple[int, ...]) -> None:
    """One is taken; more than the limit are refused, however short they are and wherever they lie."""
    check_size(Request, within(*places, content=unit), ROWS)
    with pytest.raises(TooLarge) as caught:
        check_size(Request, within(*places, content=unit * (MAX_FIELDS + 1)), ROWS)
    assert caught.value.received == f"more than {MAX_FIELDS}"


def test_fields_of_fixed_size_are_one_each() -> None:
    """As many as the limit are taken, of four and of eight bytes, whatever these hold."""
    check_size(Request, (b"\x0d" + bytes(4) + b"\x09" + bytes(8)) * (MAX_FIELDS // 2), ROWS)


def test_fields_are_counted_over_all_parts() -> None:
    """Many inputs with few fields each are too many, too."""
    request = Request(inputs=[{"name": "images", "datatype": "UINT8"}] * (MAX_FIELDS // 3))
    check_size(Request, request.SerializeToString(), ROWS)
    request.inputs.add(name="images", datatype="UINT8")
    with pytest.raises(TooLarge):
        check_size(Request, request.SerializeToString(), ROWS)


@pytest.mark.parametrize("places", [(5, 3), (5, 5, 3), (5, 5, 5)])  # a shape, int64_ and uint64_contents
def test_lists_of_wide_integers_are_as_long_as_a_batch(places: tuple[int, ...]) -> None:
    """Each number may take one byte and becomes eight, and nothing has more of them than a batch has rows."""
    check_size(Request, within(*places, content=bytes(10 * ROWS)), ROWS)
    with pytest.raises(TooLarge) as caught:
        check_size(Request, within(*places, content=bytes(10 * ROWS + 1)), ROWS)
    assert caught.value.received == f"{10 * ROWS + 1} bytes"
    assert caught.value.expected == f"at most {10 * ROWS} bytes"


def test_the_largest_honest_messages_pass() -> None:
    """A full batch in either form, with every parameter that clients are known to send."""
    parameters = {
        name: {"int64_param": -1}
        for name in (
            "sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "binary_data_output",
        )
    }  # fmt: skip
    tensor = {"name": "images", "datatype": "UINT8", "shape": [ROWS, 28, 28], "parameters": parameters}
    outputs = [{"name": name, "parameters": parameters} for name in ("digit_capsules", "capsule_lengths")]
    common = {"model_name": "tiny-encoder", "id": "1", "parameters": parameters, "outputs": outputs}
    raw = Request(**common, inputs=[tensor], raw_input_contents=[bytes(ROWS * 784)])
    typed = Request(**common, inputs=[tensor])
    typed.inputs[0].contents.uint_contents.extend([255] * (ROWS * 784))
    target = {"name": "target", "datatype": "INT64", "shape": [ROWS], "parameters": parameters}
    wide = Request(**common, inputs=[target])
    wide.inputs[0].contents.int64_contents.extend([-1] * ROWS)
    for request in (raw, typed, wide):
        check_size(Request, request.SerializeToString(), ROWS)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 2000,  # a number without an end
        b"\x78" + b"\x80" * 10 + bytes(2000),  # a number of eleven bytes
        b"\x32\x00" + b"\x3b" + b"\x32\x00" * 1000,  # a group
        within(5, content=b"\x0a\x7f" + bytes(2)) + bytes(2000),  # beyond the input that it is in
        b"\x3a\xff\xff\xff\xff\x0f" + bytes(2000),  # beyond the message
        b"\x3a\x84\x08" + bytes(1028) + b"\x3a",  # without its length
    ],
)
def test_what_is_no_message_is_refused_as_such(data: bytes) -> None:
    """Bytes of another form cost nothing either, and hide no fields behind them."""
    with pytest.raises(DecodeError):
        check_size(Request, data, ROWS)
