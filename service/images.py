"""From bytes that anybody may have sent to uint8 pixels that the network can take, and back to PNG."""

import base64
import binascii
import io
import math
from typing import Any, Literal

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray
from PIL import Image

from service.containers import cut_down, only_rows, orientation
from service.errors import InvalidInput, RequestError, TooLarge
from service.manifest import ImageSpec
from service.transparency import flatten

# Sizes are judged from the header by `open_image`, with a limit of our own and an answer for the caller;
# Pillow's own limit warns or raises before that can happen.
Image.MAX_IMAGE_PIXELS = None

Preprocess = Literal["auto", "none", "centre"]

FORMATS = {
    "image/png": "PNG",
    "image/jpeg": "JPEG",
    "image/webp": "WEBP",
    "image/bmp": "BMP",
    "image/gif": "GIF",
}
"""Media types that are taken, and Pillow's names for them."""

# The most that JPEG and GIF can have. A PNG may have millions of rows, which cost more than their pixels.
_MAX_SIDE = 65_535

# Up to this size an image's pixels may be decoded before anybody looks at how many there are.
_AT_ONCE = 64

# Photographs are laid out at this size: many times the network's input, and cheap whatever was sent.
_WORKING_SIZE = 256

# Below this many grey levels over the background's noise nothing counts as ink.
_LEAST_CONTRAST = 16.0

# Grey levels by which a border may differ from the training images' ground where nothing is laid out: as
# far as passing errs no more than laying out. See docs/decisions/0045.
_NEAR_GROUND = 1

# Bits that cameras and instruments store in 16; few of their files say which.
_DEPTHS = (8, 10, 12, 14, 16)

# What brings an image upright, by its Exif orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Of these, what swaps width and height.
_ON_ITS_SIDE = tuple(_UPRIGHT[orientation] for orientation in (5, 6, 7, 8))

# Median absolute deviation to standard deviation, for normally distributed noise.
_MAD_TO_SIGMA = 1.4826

Pixels = NDArray[np.uint8]


def open_image(data: bytes, max_pixels: int, *, at_once: bool = False) -> Image.Image:
    """Read an image's header; its pixels are not decoded yet.

    Args:
        at_once: decode those of a small PNG of nothing but rows all the same. Together that takes a third of
            the time; of many images it would be done before anybody has judged their sum.

    Raises:
        InvalidInput: not an image of a known format, or a BMP with run lengths.
        TooLarge: more than `max_pixels` pixels, too long a side, or more parts than an honest image has.
    """
    try:
        image = (at_once and _from_rows(data)) or _open(data)
    except RequestError:
        raise
    except Exception as error:  # see `_undecodable`
        raise _undecodable(_describe(data)) from error
    width, height = image.size
    if max(width, height) > _MAX_SIDE:
        raise TooLarge(
            "The image is too long.",
            received=f"{width}x{height}",
            expected=f"at most {_MAX_SIDE} pixels on either side",
        )
    if width * height > max_pixels:
        raise TooLarge(
            "The image has too many pixels.",
            received=f"{width}x{height} = {width * height} pixels",
            expected=f"at most {max_pixels} pixels",
        )
    return image


def _open(data: bytes) -> Image.Image:
    bare, exif = cut_down(data)
    image = Image.open(io.BytesIO(bare), formats=tuple(FORMATS.values()))
    # Pillow decodes these in Python, for many seconds.
    if any(tile.codec_name == "bmp_rle" for tile in image.tile):
        raise InvalidInput(
            "BMP images with run lengths are not taken.",
            received="a BMP with RLE compression",
            expected="a BMP without compression",
        )
    image.info["exif"] = exif or image.info.get("exif", b"")
    return image


def _from_rows(data: bytes) -> Image.Image | None:
    """A small PNG of nothing but rows, without reading it piece by piece as a file; None of another."""
    rows = only_rows(data)
    if rows is None:
        return None
    mode, size, compressed = rows
    if min(size) == 0 or max(size) > _AT_ONCE:
        return None
    try:
        return Image.frombytes(mode, size, compressed, "zip", mode)
    except ValueError:  # the rows are damaged, which reading the file will say
        return None


def prepare(image: Image.Image, spec: ImageSpec, preprocess: Preprocess) -> Pixels:
    """Decode an opened image and bring it to the network's form: (H, W), or (H, W, 3) for colour.

    `none` takes only the network's own size. `auto` passes an image of that size, on the ground of the
    training images, through untouched and lays out any other as those were; `centre` lays out every image.

    Raises:
        InvalidInput: the pixels cannot be decoded, or `preprocess` does not fit the image or the model.
    """
    size = (spec.width, spec.height)
    if preprocess == "none" and (upright := _upright_size(image)) != size:
        raise InvalidInput(
            "preprocess=none takes images of the model's own size.",
            received="{}x{} pixels".format(*upright),
            expected=f"{spec.width}x{spec.height} pixels, or preprocess=auto",
        )
    if preprocess == "centre" and spec.centring == "none":
        raise InvalidInput(
            "This model was trained on images that are not centred.",
            received="preprocess=centre",
            expected="preprocess=auto or preprocess=none",
        )
    try:
        pixels = _decode(image, spec, as_deep_as_needed=preprocess != "none")
    except Exception as error:  # see `_undecodable`
        raise _undecodable("an image that breaks off or is damaged") from error
    if preprocess == "none" or (preprocess == "auto" and _fits(pixels, spec)):
        return pixels
    if spec.centring == "none":
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0))
    return _lay_out(pixels, spec)


def _undecodable(received: str) -> InvalidInput:
    """What any error of Pillow's on bytes that may be anything becomes.

    Damaged data makes its decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError,
    IndexError, zlib.error and more; whichever it is, the image is what is wrong.
    """
    return InvalidInput(
        "The image cannot be decoded.",
        received=received,
        expected=f"a complete image in one of the formats {', '.join(FORMATS.values())}",
    )


def _describe(data: bytes) -> str:
    return f"{len(data)} bytes beginning with {data[:8].hex(' ')}" if data else "0 bytes"


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What brings the image upright."""
    return _UPRIGHT.get(orientation(image.info.get("exif", b"")))


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if _turn(image) in _ON_ITS_SIDE else (width, height)


def _decode(image: Image.Image, spec: ImageSpec, *, as_deep_as_needed: bool) -> Pixels:
    """The image upright, without transparency, in 8 bits: (h, w) or (h, w, 3).

    Args:
        as_deep_as_needed: take one of 16 bits for one of so many as its brightest pixel needs.
    """
    mode = "L" if spec.channels == 1 else "RGB"
    if type(image) is Image.Image and image.mode == mode:  # it has been decoded
        return _pixels(image)
    least = max(_WORKING_SIZE, spec.height, spec.width)
    image.draft(mode, (least, least))  # a large JPEG is decoded at a fraction of its size
    image.load()  # it may change the mode
    turn = _turn(image)
    image = image if turn is None else image.transpose(turn)
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to 255
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        bits = next(bits for bits in _DEPTHS if levels.max() < 1 << bits) if as_deep_as_needed else 16
        image = Image.fromarray((levels * 255 // ((1 << bits) - 1)).astype(np.uint8))
    if image.has_transparency_data:
        image = flatten(image.convert("RGBA"))
    return _pixels(image if image.mode == mode else image.convert(mode))


def _pixels(image: Image.Image) -> Pixels:
    """Of a grey image (h, w), of one in colour (h, w, 3)."""
    width, height = image.size
    # np.asarray asks Pillow for a description of the array first.
    levels = np.frombuffer(image.tobytes(), np.uint8)
    return levels.reshape((height, width) if image.mode == "L" else (height, width, 3))


def _fits(pixels: Pixels, spec: ImageSpec) -> bool:
    """Whether the image has the network's size, on the ground of the images that it was trained on."""
    if pixels.shape[:2] != (spec.height, spec.width):
        return False
    ground = 0 if spec.polarity == "light_on_dark" else 255
    return spec.centring == "none" or abs(_ground(pixels) - ground) <= _NEAR_GROUND


def _light_on_dark(grey: Pixels) -> bool:
    """Whether what stands out from the border's level is lighter than it; so for a blank page, too."""
    background = _ground(grey)
    return int(grey.max()) - background >= background - int(grey.min())


def _ground(grey: Pixels) -> int:
    """The border's median level."""
    levels, width = grey.tobytes(), grey.shape[1]
    border = sorted(levels[:width] + levels[-width:] + levels[::width] + levels[width - 1 :: width])
    return border[len(border) // 2]  # nothing of NumPy's is as quick for so few


def _lay_out(pixels: Pixels, spec: ImageSpec) -> Pixels:
    """Lay a grey image out as MNIST was made: ink in a box, placed by its centre of mass."""
    working = Image.fromarray(pixels)
    working.thumbnail((_WORKING_SIZE, _WORKING_SIZE), reducing_gap=2.0)
    ink = _level(np.asarray(working))
    canvas = np.zeros((spec.height, spec.width), np.uint8)
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    if rows.size:
        ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        # The manifest has a box wherever images are centred.
        ink = _scale(ink, spec.box or min(spec.height, spec.width))
        height, width = ink.shape
        top = _offset(ink.sum(axis=1), spec.height)
        left = _offset(ink.sum(axis=0), spec.width)
        canvas[top : top + height, left : left + width] = np.rint(255 * ink)
    return canvas if spec.polarity == "light_on_dark" else 255 - canvas


def _level(grey: Pixels) -> NDArray[np.float32]:
    """Ink in [0, 1] on a background of 0, whatever the lighting and the polarity: (h, w)."""
    levels = grey.astype(np.float32)
    if not _light_on_dark(grey):
        levels = 255 - levels
    levels -= _background(levels)
    noise = _MAD_TO_SIGMA * float(np.median(np.abs(levels)))
    floor = 0.5 + 6 * noise  # six standard deviations: no pixel of the background stays
    highest = float(levels.max())
    if highest - floor < _LEAST_CONTRAST:
        return np.zeros_like(levels)
    full = float(np.median(levels[levels > (floor + highest) / 2]))
    return ((levels - floor) / (full - floor)).clip(0, 1)


def _background(levels: NDArray[np.float32]) -> NDArray[np.float32]:
    """The smooth surface under the ink: a plane from the border, then a quadratic from all that is near."""
    height, width = levels.shape
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    terms = np.stack((np.ones_like(x), x, y, x * y, x * x, y * y), axis=-1)  # (h, w, 6)
    near = np.ones((height, width), bool)
    near[1:-1, 1:-1] = False
    surface = np.zeros_like(levels)
    for count in (3, 3, 6):
        coefficients, *_ = np.linalg.lstsq(terms[near][:, :count], levels[near], rcond=None)
        surface = terms[:, :, :count] @ coefficients
        distance = np.abs(levels - surface)
        near = distance <= 0.5 + 3 * _MAD_TO_SIGMA * float(np.median(distance))
    return surface


def _scale(ink: NDArray[np.float32], box: int) -> NDArray[np.float32]:
    """The ink with its longer side `box` pixels, aspect kept, at full strength."""
    scale = box / max(ink.shape)
    height, width = (max(1, round(side * scale)) for side in ink.shape)
    scaled: NDArray[np.float32] = np.asarray(
        Image.fromarray(ink).resize((width, height), Image.Resampling.BICUBIC)
    ).clip(0, 1)
    return scaled / np.float32(scaled.max())  # thin strokes fade when they are made smaller


def _offset(mass: NDArray[np.float32], size: int) -> int:
    """Where a strip of this mass begins so that its centre of mass is at size / 2, as MNIST does."""
    centre = float(mass @ np.arange(mass.size) / mass.sum())
    return min(max(round(size / 2 - centre), 0), size - mass.size)


def decode_base64(text: str) -> bytes:
    """Bytes of a base64 text or of a base64 data URL.

    Raises:
        InvalidInput: neither of the two.
    """
    encoded = text
    if text[:5].lower() == "data:":
        head, _, encoded = text.partition(",")
        if head[-7:].lower() != ";base64":
            raise InvalidInput(
                "The data URL is not in base64.", received=repr(text[:40]), expected="data:image/png;base64,…"
            )
    try:
        return binascii.a2b_base64(encoded.replace("\r", "").replace("\n", ""), strict_mode=True)
    except ValueError as error:
        raise InvalidInput(
            "The base64 text is broken.",
            received=f"{len(text)} characters beginning with {text[:20]!r} ({error})",
            expected="base64 (RFC 4648) or a data URL in base64",
        ) from error


def read_npy(data: bytes, shape: tuple[int, ...], max_images: int) -> Pixels:
    """Images from an npy file: uint8 (N, *shape), read without ever unpickling.

    Raises:
        InvalidInput: not such a file; says what its header holds.
        TooLarge: more than `max_images` images.
    """
    file = io.BytesIO(data)
    try:
        found, fortran, dtype = _npy_header(file)
        received = f"{dtype} {found}"[:200]
    # The header is a Python literal from anybody: a deep or odd one raises SyntaxError, RecursionError,
    # MemoryError, TypeError, UnicodeDecodeError and more, and so does writing down a number of its shape.
    except Exception as error:
        raise InvalidInput(
            "The body is not an npy file.",
            received=_describe(data),
            expected="an npy file of version 1.0 or 2.0, as numpy.save writes",
        ) from error
    # Python's True is a number to NumPy's parser, but no length of an array.
    if dtype != np.uint8 or found[1:] != shape or not found or found[0] is True or found[0] < 1:
        raise InvalidInput(
            "The npy array is not a batch of images.",
            received=received,
            expected=f"uint8 (N, {', '.join(map(str, shape))}) with N at least 1",
        )
    if found[0] > max_images:
        raise TooLarge("Too many images.", received=str(found[0]), expected=f"at most {max_images} images")
    values = np.frombuffer(data, np.uint8, offset=file.tell())
    if values.size != math.prod(found):
        raise InvalidInput(
            "The npy file's length does not match its header.",
            received=f"{values.size} bytes of data",
            expected=f"{math.prod(found)} bytes for {found}",
        )
    return np.ascontiguousarray(values.reshape(found, order="F" if fortran else "C"))


def _npy_header(file: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy_format.read_magic(file)
    if version == (1, 0):
        return npy_format.read_array_header_1_0(file)
    if version == (2, 0):
        return npy_format.read_array_header_2_0(file)
    raise ValueError(f"version {version}")


def to_uint8(values: NDArray[np.float32]) -> Pixels:
    """Grey levels or colours in [0, 1] as 0 … 255."""
    return np.rint(values * 255).astype(np.uint8)


def encode_png(pixels: Pixels, *, large: bool = False) -> bytes:
    """A PNG of (h, w) grey or (h, w, 3) colour.

    Args:
        large: leave out PNG's search for the best filter of each row, half of the time for a large image.
            Grey ones are then written with a palette of greys, since files with one have no filters.
    """
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    if large and image.mode == "L":
        image = image.convert("P")
    image.save(file, "PNG", compress_level=1)  # a tenth of the time, a few bytes more
    return file.getvalue()


def data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
