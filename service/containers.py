"""Encoded images cut down to what their pixels need, so that a file costs Pillow what its pixels cost.

Pillow unpacks, copies and takes apart whatever else a file holds, and nothing stops it: a few kilobytes of
gzip are enough for minutes. See docs/decisions/0013.
"""

import re
import struct
import zlib
from collections.abc import Iterator

from service.errors import InvalidInput, TooLarge

_PNG = b"\x89PNG\r\n\x1a\n"

# Chunks of a PNG (W3C, third edition) that its pixels need; an animation's first image is in them, too.
_PNG_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}

# A PNG's signature and header, and where its first chunk begins; behind that chunk come its checksum, which
# Pillow does not look at, and the chunk that ends the file.
_PNG_BEGINNING = struct.Struct(">16sII5sII4s")
_PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"
_PNG_MODES = {b"\x08\0\0\0\0": "L", b"\x08\2\0\0\0": "RGB"}  # 8 bits, rows from top to bottom

# A JPEG's next marker (ITU-T T.81, B.1.1.2) past fill bytes, stuffed zeros, restarts, and what is reserved:
# libjpeg skips that as well, and not what follows it.
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_NEEDED = {*_FRAMES, 0xC4, 0xCC, 0xDB, 0xDC, 0xDD}  # and DHT, DAC, DQT, DNL, DRI
_EOI, _SOS, _JFIF, _EXIF, _ADOBE = 0xD9, 0xDA, 0xE0, 0xE1, 0xEE

# A body of 16 MiB in the longest segments has 257; each scan of a progressive JPEG may visit every pixel, and
# libjpeg's own script has ten; the tables of a usual JPEG have 600 to 2,000 bytes.
_MOST_SEGMENTS = 1024
_MOST_SCANS = 32
_MOST_TABLES = 8 * 1024  # bytes

_ORIENTATION = 0x0112
_INTEGERS = {1: 1, 3: 2, 4: 4}  # Exif's types for an integer without sign, and their bytes


def only_rows(data: bytes) -> tuple[str, tuple[int, int], bytes] | None:
    """What a PNG has that is nothing but a chunk of rows, in 8 bits of grey or colour; None of another file.

    Most programs write a small image so. These are Pillow's mode, width and height, and the compressed rows.
    """
    if len(data) < _PNG_BEGINNING.size + 4 + len(_PNG_END):
        return None
    signature, width, height, form, checksum, length, kind = _PNG_BEGINNING.unpack_from(data)
    mode = _PNG_MODES.get(form)
    end = _PNG_BEGINNING.size + length
    if (
        mode is None
        or signature != _PNG + b"\0\0\0\x0dIHDR"
        or kind != b"IDAT"
        or data[end + 4 :] != _PNG_END
        or checksum != zlib.crc32(data[12:29])
    ):
        return None
    return mode, (width, height), data[_PNG_BEGINNING.size : end]


def cut_down(data: bytes) -> tuple[bytes, bytes]:
    """The image without texts, profiles, thumbnails and the like, and its Exif data, b"" without any.

    Those of a WebP, which libwebp reads and Pillow need not unpack, and a BMP's few stay where they are. What
    is no image comes back as it is.

    Raises:
        TooLarge: more parts than an honest image has.
        InvalidInput: a GIF without an image.
        IndexError: the file breaks off.
    """
    if data.startswith(_PNG):
        return _cut_png(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _cut_jpeg(data)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return _cut_gif(data), b""
    return data, b""


def orientation(exif: bytes) -> int:
    """How the image is to be turned, 1 to 8 (Exif 2.32, 4.6.4); 1, upright, where that is not said."""
    if not exif:
        return 1
    exif = exif.removeprefix(b"Exif\0\0")
    order = "<" if exif.startswith(b"II") else ">"
    try:
        (start,) = struct.unpack_from(f"{order}L", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
    except struct.error:
        return 1
    count = min(count, (len(exif) - start - 2) // 12)
    for tag, kind, _, value in struct.iter_unpack(f"{order}HHL4s", exif[start + 2 : start + 2 + 12 * count]):
        if tag == _ORIENTATION:
            return int.from_bytes(value[: _INTEGERS.get(kind, 0)], "little" if order == "<" else "big")
    return 1


def _cut_png(data: bytes) -> tuple[bytes, bytes]:
    whole = memoryview(data)
    kept, exif, position = [whole[:8]], b"", 8
    most = 500 + len(data) // 256  # libpng writes 8,192 bytes in each
    for _ in range(most):
        length, kind = int.from_bytes(data[position : position + 4]), data[position + 4 : position + 8]
        end = position + 12 + length
        if kind in _PNG_CHUNKS:
            kept.append(whole[position:end])
        elif kind == b"eXIf":
            exif = data[position + 8 : end - 4]
        if kind in (b"IEND", b"fdAT") or end >= len(data):  # of an animation all after the first is left out
            return b"".join(kept), exif
        position = end
    raise _too_many(f"{most} chunks")


def _cut_jpeg(data: bytes) -> tuple[bytes, bytes]:
    """What stands before the first scan, cut down, and all the rest."""
    kept, exif = [], b""
    colours = {}  # what says which ones there are: a segment of each kind
    first_scan = len(data)
    scans = frames = tables = 0
    for marker, start, end in _segments(data):
        if marker == _SOS:
            first_scan = min(first_scan, start)
            scans += 1
            if scans > _MOST_SCANS:
                raise _too_many(f"{_MOST_SCANS} scans")
        elif first_scan < len(data):
            continue
        elif marker == _EXIF and not exif and data.startswith(b"Exif\0\0", start + 4):
            exif = data[start + 4 : end]
        elif marker in (_JFIF, _ADOBE) and data.startswith((b"JFIF\0", b"Adobe"), start + 4):
            colours[marker] = data[start:end]
        elif marker in _NEEDED:
            kept.append(data[start:end])
            frames += marker in _FRAMES
            tables += end - start
            if frames > 1 or tables > _MOST_TABLES:
                raise _too_many(f"one frame and {_MOST_TABLES} bytes of tables")
    return b"".join((data[:2], *colours.values(), *kept, memoryview(data)[first_scan:])), exif


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """A JPEG's markers, and where each one's segment begins and ends."""
    position = 2
    for _ in range(_MOST_SEGMENTS):
        found = _MARKER.search(data, position)
        if found is None or (marker := data[found.start() + 1]) == _EOI:
            return
        start = found.start()
        position = start + 2 + max(2, int.from_bytes(data[start + 2 : start + 4]))
        yield marker, start, position
    raise _too_many(f"{_MOST_SEGMENTS} segments")


def _cut_gif(data: bytes) -> bytes:
    """The colours, the first image's transparency, and all from that image on."""
    position = head = 13 + (3 << (data[10] & 7) + 1 if data[10] & 128 else 0)
    control = b""
    left = most = 1000 + len(data) // 16
    while data[position] == ord("!"):
        if data.startswith(b"!\xf9\x04", position) and data[position + 7] == 0:
            control = data[position : position + 8]
        position += 2
        while True:
            length = data[position]
            position += 1 + length
            left -= 1
            if left < 0:
                raise _too_many(f"{most} blocks before its first image")
            if length == 0:
                break
    if data[position] != ord(","):
        raise InvalidInput(
            "The GIF has no image.",
            received=f"a block of the kind {data[position]:#04x}",
            expected="an image",
        )
    return data[:head] + control + data[position:]


def _too_many(most: str) -> TooLarge:
    return TooLarge("The image has too many parts.", received=f"more than {most}", expected=f"at most {most}")
