"""Whatever else an encoded image holds costs nothing, and of an honest one no pixel changes."""

import io
import struct
import zlib
from functools import partial
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from service.containers import cut_down, orientation
from service.errors import CallerError, InvalidInput, TooLarge
from service.images import open_image, prepare
from service.manifest import ImageSpec
from tests.support.encoded import encode

SPEC = ImageSpec(height=32, width=32, channels=3, polarity="light_on_dark", centring="none")
MAX_PIXELS = 1 << 24
PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
PNG, JPEG, GIF = (encode(PIXELS, name) for name in ("PNG", "JPEG", "GIF"))
GIF_HEAD = 13 + 3 * 256


def saved(image: Image.Image, image_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def in_png(chunks: bytes) -> bytes:
    """The PNG with further chunks after its header."""
    return PNG[:33] + chunks + PNG[33:]


def segment(marker: int, body: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", 2 + len(body)) + body


def in_jpeg(segments: bytes) -> bytes:
    """The JPEG with further segments at its beginning."""
    return JPEG[:2] + segments + JPEG[2:]


def in_gif(blocks: bytes) -> bytes:
    """The GIF with further blocks before its image."""
    return GIF[:GIF_HEAD] + blocks + GIF[GIF_HEAD:]


def scans(count: int) -> bytes:
    """A progressive JPEG of 32x32 grey pixels."""
    table = bytes((1, *[0] * 15, 0))  # one code, for the end of a block
    frame = segment(0xC2, struct.pack(">BHHB", 8, 32, 32, 1) + b"\x01\x11\x00")
    tables = segment(0xDB, b"\x00" + b"\x01" * 64) + segment(0xC4, b"\x00" + table + b"\x10" + table)
    first, later = (
        segment(0xDA, b"\x01\x01\x00" + band + b"\x00") + bytes(2) for band in (b"\0\0", b"\1\x3f")
    )
    return b"\xff\xd8" + tables + frame + first + (count - 1) * later + b"\xff\xd9"


def run_lengths() -> bytes:
    """A BMP whose pixels are coded as run lengths."""
    raw = bytearray(encode(PIXELS[:, :, 0], "BMP"))
    raw[30] = 1
    return bytes(raw)


def oriented(value: int, order: str = "<", kind: int = 3) -> bytes:
    """Exif data that say nothing but how the image is to be turned."""
    head = b"II*\0" if order == "<" else b"MM\0*"
    padded = struct.pack(order + ("H2x" if kind == 3 else "L"), value)
    return b"Exif\0\0" + head + struct.pack(f"{order}LHHHL", 8, 1, 0x0112, kind, 1) + padded + bytes(4)


def text() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("Title", "a" * 3000, zip=True)
    info.add_itxt("Author", "b" * 3000, zip=True)
    return info


RGB = Image.fromarray(PIXELS)
LATER = Image.fromarray(255 - PIXELS)
FADE = [Image.new("RGB", (32, 32), (level % 256, 0, 0)) for level in range(600)]
THUMBNAIL = b"Exif\0\0II*\0\x08\0\0\0\0\0" + bytes(4) + encode(PIXELS[:16, :16], "JPEG")
IN_PARTS = [PNG[41:-16][start : start + 8] for start in range(0, len(PNG) - 57, 8)]
HONEST = {
    "PNG": PNG,
    "PNG with texts and a profile": saved(RGB, "PNG", pnginfo=text(), icc_profile=bytes(500_000)),
    "PNG with a palette": saved(RGB.quantize(9), "PNG", transparency=3),
    "PNG with a transparent colour": saved(RGB, "PNG", transparency=tuple(PIXELS[0, 0].tolist())),
    "PNG in many parts": PNG[:33] + b"".join(map(partial(chunk, b"IDAT"), IN_PARTS)) + chunk(b"IEND", b""),
    "interlaced APNG": saved(RGB, "PNG", save_all=True, append_images=[LATER] * 20),
    "APNG with an image of its own": saved(
        RGB, "PNG", save_all=True, append_images=[LATER] * 2, default_image=True
    ),
    "APNG of many small images": saved(FADE[0], "PNG", save_all=True, append_images=FADE[1:]),
    "PNG with something after it": PNG + bytes(99_999),
    "JPEG": JPEG,
    "JPEG of a camera": in_jpeg(segment(0xE1, THUMBNAIL) + b"\xff" * 7 + segment(0xE2, b"FPXR\0")),
    "JPEG that is said to be turned, and then not": in_jpeg(
        segment(0xE1, oriented(6)) + segment(0xE1, oriented(1))
    ),
    "JPEG with a profile": saved(RGB, "JPEG", icc_profile=bytes(500_000), comment=b"hello"),
    "JPEG in scans": saved(RGB, "JPEG", progressive=True, optimize=True, quality=95),
    "JPEG with restarts": saved(RGB, "JPEG", restart_marker_blocks=1),
    "JPEG of four colours": saved(RGB.convert("CMYK"), "JPEG"),
    "JPEG of several images": saved(RGB, "MPO", save_all=True, append_images=[LATER]),
    "JPEG with something after it": JPEG + JPEG * 40 + bytes(99_999),
    "GIF": GIF,
    "GIF with a comment": in_gif(b"!\xfe" + 100 * (b"\xff" + b"a" * 255) + b"\x00"),
    "GIF that moves": saved(RGB, "GIF", save_all=True, append_images=[LATER] * 3, loop=0, disposal=2),
    "GIF with transparency": saved(RGB.quantize(9), "GIF", transparency=3),
    "BMP": encode(PIXELS, "BMP"),
    "WebP": encode(PIXELS, "WEBP", icc_profile=bytes(500)),
    "WebP that moves": saved(RGB, "WEBP", save_all=True, append_images=[LATER]),
}


@pytest.mark.parametrize("data", HONEST.values(), ids=HONEST.keys())
def test_honest_images_keep_every_pixel(data: bytes) -> None:
    """What is decoded after the cut is what Pillow decodes without it."""
    whole = Image.open(io.BytesIO(data))
    got = prepare(open_image(data, MAX_PIXELS), SPEC, "none")
    bare = prepare(whole, SPEC, "none")
    np.testing.assert_array_equal(got, bare)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_every_orientation_is_applied(image_format: str) -> None:
    """An image is turned as its Exif data say, in both byte orders, and stays where they are nonsense."""
    for exif in [oriented(value, order, kind) for value in range(10) for order in "<>" for kind in (3, 4)]:
        data = encode(PIXELS, image_format, exif=exif)
        got = prepare(open_image(data, MAX_PIXELS), SPEC, "none")
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(got, np.asarray(upright))


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"Exif\0\0",
        b"II*\0\xff\xff\xff\xff",
        oriented(6)[:20],
        oriented(6)[:-9],
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
    ],
)
def test_damaged_exif_data_turn_nothing(exif: bytes) -> None:
    """Where the directory breaks off the image counts as upright."""
    assert orientation(exif) == 1


PACKED = zlib.compress(bytes(1 << 20))


@pytest.mark.parametrize(
    ("data", "plain"),
    [
        (in_png(chunk(b"zTXt", b"k\0\0" + PACKED) * 30), PNG),
        (in_png(chunk(b"iTXt", b"k\0\1\0\0\0" + PACKED) * 30), PNG),
        (in_png(chunk(b"iCCP", b"k\0\0" + PACKED) * 30), PNG),
        (in_png(chunk(b"eXIf", b"II*\0" + bytes(100_000))), PNG),
        (in_jpeg(segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 200), JPEG),
        (in_jpeg(segment(0xED, b"Photoshop 3.0\0" + b"8BIM" + bytes(60_000)) * 200), JPEG),
        (in_jpeg(segment(0xE2, b"MPF\0" + bytes(60_000)) * 200), JPEG),
        (in_jpeg(segment(0xE0, b"JFIF\0" + bytes(9)) * 900), JPEG),
        (in_jpeg(b"\xff" * (1 << 22)), JPEG),
        # Pillow skips neither of these two by its length, and would take what is in it for segments.
        (in_jpeg(segment(0xC8, segment(0xE1, bytes(4000)))), JPEG),
        (in_jpeg(segment(0xD8, segment(0xE1, bytes(4000)))), JPEG),
        (in_gif(b"!\xfe" + b"\x02ab" * 1000 + b"\x00"), GIF),
        (in_gif(b"!\xff\x0bNETSCAPE2.0\x00" + b"!\x01\x00" * 100), GIF),
        # A control block that goes on behind its four bytes would swallow the image.
        (in_gif(b"!\xf9\x04\1\0\0\3\1a\0"), GIF),
    ],
    ids=[
        "zTXt",
        "iTXt",
        "iCCP",
        "eXIf",
        "Exif",
        "Photoshop",
        "MPF",
        "JFIF",
        "fill bytes",
        "JPG",
        "SOI",
        "comment",
        "extensions",
        "long control",
    ],
)
def test_pillow_sees_nothing_but_what_pixels_need(data: bytes, plain: bytes) -> None:
    """Texts, profiles, directories and fill bytes are gone before Pillow could unpack or copy them."""
    assert cut_down(data)[0] == cut_down(plain)[0]
    got, expected = (prepare(open_image(one, MAX_PIXELS), SPEC, "none") for one in (data, plain))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("data", "error", "expected"),
    [
        (in_png(chunk(b"IDAT", b"") * 2000), TooLarge, "chunks"),
        (in_png(chunk(b"tEXt", b"k\0v") * 20_000), TooLarge, "chunks"),
        (in_jpeg(segment(0xE1, b"Exif\0\0") * 2000), TooLarge, "1024 segments"),
        (in_jpeg(segment(0xDB, (b"\0" + b"\1" * 64) * 1000)), TooLarge, "8192 bytes of tables"),
        (in_jpeg(segment(0xC0, struct.pack(">BHHB", 8, 32, 32, 1) + b"\1\x11\0")), TooLarge, "one frame"),
        (scans(33), TooLarge, "32 scans"),
        # A segment between two scans hides none of those that follow it.
        (scans(1)[:-2] + segment(0xFE, b"\xff\xd9") + scans(40)[2:], TooLarge, "32 scans"),
        # Nor does a reserved marker, which libjpeg skips without what follows it.
        (scans(1)[:-2] + b"\xff\x02\xff\xff" + scans(40)[2:], TooLarge, "32 scans"),
        (in_gif(b"!\xfe" + b"\x01a" * 50_000 + b"\x00"), TooLarge, "blocks"),
        (in_gif(b"!\x01\x00" * 50_000), TooLarge, "blocks"),
        (in_gif(b"\x00" * 50_000), InvalidInput, "an image"),
        (run_lengths(), InvalidInput, "without compression"),
    ],
    ids=[
        "IDAT",
        "tEXt",
        "Exif",
        "DQT",
        "SOF",
        "scans",
        "EOI in a comment",
        "reserved marker",
        "comment",
        "extensions",
        "junk",
        "BMP",
    ],
)
def test_more_parts_than_an_honest_image_has_are_refused(
    data: bytes, error: type[CallerError], expected: str
) -> None:
    """Parts that cost time each are refused beyond a number, with what is taken at most."""
    with pytest.raises(error) as refused:
        open_image(data, MAX_PIXELS)
    assert expected in str(refused.value.expected)


def test_as_many_scans_as_are_allowed_are_decoded() -> None:
    """A progressive JPEG of the most scans is read."""
    assert (prepare(open_image(scans(32), MAX_PIXELS), SPEC, "none") == 128).all()


def test_a_large_png_is_read_in_the_parts_that_libpng_writes() -> None:
    """Chunks of 8,192 bytes are never too many, however many of them the pixels need."""
    noise = np.random.default_rng(0).integers(0, 256, (2300, 2300), np.uint8)
    rows = zlib.compress(np.pad(noise, ((0, 0), (1, 0))).tobytes(), 0)
    parts = [chunk(b"IDAT", rows[start : start + 8192]) for start in range(0, len(rows), 8192)]
    assert len(parts) > 500
    header = chunk(b"IHDR", struct.pack(">II5B", 2300, 2300, 8, 0, 0, 0, 0))
    data = PNG[:8] + header + b"".join(parts) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(np.asarray(open_image(data, MAX_PIXELS)), noise)
