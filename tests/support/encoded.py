"""Encoded images and arrays, honest and otherwise, for tests."""

import base64
import gzip
import io
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def encode(pixels: NDArray[Any], image_format: str = "PNG", **options: Any) -> bytes:
    """An image file of an (h, w[, channels]) array."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format, **options)
    return file.getvalue()


def gzipped(data: bytes) -> bytes:
    """Compressed, and the same bytes each time: pytest makes tests' names of them."""
    return gzip.compress(data, mtime=0)


def base64_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def decode(data: bytes) -> NDArray[Any]:
    """The pixels of an image file."""
    return np.asarray(Image.open(io.BytesIO(data)))


def decode_data_url(url: str) -> NDArray[Any]:
    head, _, text = url.partition(",")
    assert head == "data:image/png;base64"
    return decode(base64.b64decode(text))


def png_bomb(width: int, height: int) -> bytes:
    """A complete and valid grey PNG of any size in little memory: every pixel is 0."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))
        )

    row = bytes(1 + width)
    compressor = zlib.compressobj(9)
    data = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def npy(array: NDArray[Any], *, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def npy_with_header(header: str, data: bytes = b"") -> bytes:
    """An npy file of version 1.0 whose header says whatever it likes."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data
