"""Bytes from anybody become the network's pixels, or an error that says why not."""

import io
import itertools
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from service import images
from service.errors import InvalidInput, TooLarge
from service.images import (
    Pixels,
    Preprocess,
    decode_base64,
    encode_png,
    open_image,
    prepare,
    read_npy,
    to_uint8,
)
from service.manifest import ImageSpec
from tests.support.encoded import base64_text, encode, npy, npy_with_header, png_bomb
from tests.support.mnist import mnist_test_images

MNIST = ImageSpec(
    height=28, width=28, channels=1, polarity="light_on_dark", centring="centre_of_mass", box=20
)
DARK = MNIST.model_copy(update={"polarity": "dark_on_light"})
PLAIN = ImageSpec(height=28, width=28, channels=1, polarity="light_on_dark", centring="none")
COLOUR = ImageSpec(height=32, width=32, channels=3, polarity="light_on_dark", centring="none")

MAX_PIXELS = 4_000_000


def prepared(data: bytes, spec: ImageSpec = MNIST, preprocess: Preprocess = "auto") -> Pixels:
    return prepare(open_image(data, MAX_PIXELS), spec, preprocess)


def glyph(size: int = 28) -> NDArray[np.uint8]:
    """A light L on black whose bounding box is 20/28 of the size high and 10/28 wide."""
    unit = size // 28
    image = np.zeros((size, size), np.uint8)
    y, x = 4 * unit, 9 * unit
    image[y : y + 20 * unit, x : x + 3 * unit] = 255
    image[y + 17 * unit : y + 20 * unit, x : x + 10 * unit] = 255
    return image


def box(pixels: Pixels) -> tuple[int, int]:
    """Height and width of the smallest rectangle around the ink."""
    rows, columns = np.nonzero(pixels > 32)
    return int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1


def centre_of_mass(pixels: Pixels) -> tuple[float, float]:
    y, x = np.indices(pixels.shape)
    return float((y * pixels).sum() / pixels.sum()), float((x * pixels).sum() / pixels.sum())


@pytest.mark.parametrize("preprocess", ["auto", "none"])
def test_the_models_own_form_passes_untouched(preprocess: Preprocess) -> None:
    """Every pixel of an image of the model's size and polarity reaches the network as it is."""
    image = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    image[0] = image[-1] = image[:, 0] = image[:, -1] = 0
    np.testing.assert_array_equal(prepared(encode(image), preprocess=preprocess), image)


@pytest.mark.parametrize("spec", [MNIST, DARK], ids=["light on dark", "dark on light"])
def test_the_models_own_size_on_a_grey_ground_is_laid_out(spec: ImageSpec) -> None:
    """A ground one level off the training images' passes untouched; one of two is levelled away."""
    for level in range(12):
        grey = np.maximum(glyph(), level).astype(np.uint8)
        image = grey if spec is MNIST else 255 - grey
        got = prepared(encode(image), spec)
        if level <= 1:
            np.testing.assert_array_equal(got, image)
        else:
            np.testing.assert_array_equal(got, prepared(encode(image), spec, "centre"))
            assert got[0, 0] == (0 if spec is MNIST else 255)


@pytest.mark.parametrize("turns", range(4))
def test_all_four_sides_decide_on_the_ground(turns: int) -> None:
    """Two grey sides are most of the border with their three corners, and less than half without any."""
    image = glyph()
    image[-1] = image[:, -1] = 90
    most, rest = np.rot90(image, turns), np.rot90(image, turns).copy()
    rest[[0, 0, -1, -1], [0, -1, 0, -1]] = 0
    np.testing.assert_array_equal(prepared(encode(most)), prepared(encode(most), preprocess="centre"))
    np.testing.assert_array_equal(prepared(encode(rest)), rest)


def test_every_mnist_test_image_passes_untouched() -> None:
    """The network sees what it was measured on, bit for bit."""
    for image in mnist_test_images().images.numpy():
        np.testing.assert_array_equal(prepare(Image.fromarray(image), MNIST, "auto"), image)


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "GIF"])
def test_lossless_formats_carry_every_pixel(image_format: str) -> None:
    """PNG, BMP and GIF of the model's own form reach the network as they are."""
    np.testing.assert_array_equal(prepared(encode(glyph(), image_format)), glyph())


@pytest.mark.parametrize(("image_format", "options"), [("JPEG", {"quality": 95}), ("WEBP", {"quality": 95})])
def test_lossy_formats_are_read(image_format: str, options: dict[str, Any]) -> None:
    """JPEG and WebP of the model's own form reach the network as near as they are."""
    got = prepared(encode(glyph(), image_format, **options), preprocess="none")
    assert np.abs(got.astype(int) - glyph()).mean() < 6


def test_colour_of_the_models_size_becomes_grey() -> None:
    """A white-on-black RGB image of the model's size passes untouched but for its channels."""
    rgb = np.repeat(glyph()[:, :, np.newaxis], 3, axis=2)
    np.testing.assert_array_equal(prepared(encode(rgb)), glyph())


def test_dark_ink_on_light_paper_becomes_light_on_dark() -> None:
    """The polarity is found from the border, and the result is that of the same ink in light on dark."""
    inverted = prepared(encode(255 - glyph()))
    centred = prepared(encode(glyph()), preprocess="centre")
    np.testing.assert_allclose(inverted.astype(int), centred, atol=1)
    assert centre_of_mass(inverted) == pytest.approx((14, 14), abs=0.51)


def test_a_model_of_dark_ink_gets_dark_ink() -> None:
    """For a dark_on_light model the same rules hold the other way round."""
    np.testing.assert_array_equal(prepared(encode(255 - glyph()), DARK), 255 - glyph())
    assert prepared(encode(glyph()), DARK)[0, 0] == 255


@pytest.mark.parametrize("corner", [(0, 0), (0, 180), (100, 90)])
def test_ink_is_scaled_into_the_box_and_centred_by_mass(corner: tuple[int, int]) -> None:
    """Wherever the ink lies and however large it is: 20 pixels high, aspect kept, mass in the middle."""
    image = np.full((280, 280), 255, np.uint8)
    image[corner[0] : corner[0] + 160, corner[1] : corner[1] + 24] = 0
    image[corner[0] + 136 : corner[0] + 160, corner[1] : corner[1] + 80] = 0
    got = prepared(encode(image))
    assert box(got) == (20, 10)
    assert centre_of_mass(got) == pytest.approx((14, 14), abs=0.51)
    assert got.max() == 255


def test_a_shaded_and_noisy_photograph_is_levelled() -> None:
    """Uneven light, a tint and sensor noise leave no trace on the background."""
    rng = np.random.default_rng(0)
    ink = np.asarray(Image.fromarray(glyph(560)).resize((900, 1200))) / 255.0
    y, x = np.mgrid[0:1:1200j, 0:1:900j]
    paper = (220 - 90 * x - 40 * y) * (1 - 0.75 * ink) + rng.normal(0, 4, ink.shape)
    photo = np.clip(np.stack([paper, 0.95 * paper, 0.85 * paper], axis=-1), 0, 255).astype(np.uint8)
    got = prepared(encode(photo, "JPEG", quality=80))
    assert (got == 0).mean() > 0.7
    assert box(got) == pytest.approx((20, 8), abs=1)
    assert np.median(got[got > 128]) > 230


def test_a_photograph_that_is_darker_at_its_edges_is_levelled() -> None:
    """Light that falls off from the middle on, as a lens or a lamp has it, is no ink."""
    y, x = np.mgrid[-1:1:280j, -1:1:280j]
    paper = (230 - 60 * x * x - 60 * y * y) * (1 - 0.75 * (glyph(280) > 0))
    got = prepared(encode(paper.astype(np.uint8)))
    np.testing.assert_array_equal(got > 128, prepared(encode(255 - glyph(280))) > 128)


def test_thin_strokes_keep_their_strength() -> None:
    """A stroke much thinner than a pixel of the result is still drawn at full strength."""
    image = np.full((1000, 1000), 255, np.uint8)
    image[200:800, 498:502] = image[498:502, 200:800] = 0
    assert prepared(encode(image)).max() == 255


@pytest.mark.parametrize("seed", range(4))
def test_the_grain_of_paper_is_no_ink(seed: int) -> None:
    """Not one of its pixels is drawn beside the stroke, or takes part of the box from it."""
    page = np.random.default_rng(seed).normal(200, 5, (256, 256))
    page[60:180, 100:124] -= 140
    got = prepared(encode(page.astype(np.uint8)))
    assert (box(got), int(np.count_nonzero(got))) == ((20, 4), 20 * 4)


@pytest.mark.parametrize(("contrast", "drawn"), [(16, False), (17, True)])
def test_faint_ink_is_ink_from_a_contrast_on(contrast: int, drawn: bool) -> None:
    """What stands out from clean paper by sixteen levels or fewer is a trace, and beyond that a stroke."""
    page = 200 - np.where(glyph(252) > 0, contrast, 0).astype(np.uint8)
    assert prepared(encode(page)).any() == drawn


def test_a_blank_page_stays_blank() -> None:
    """Without ink there is nothing to scale: the network sees its background."""
    noise = np.random.default_rng(0).normal(200, 3, (300, 300)).astype(np.uint8)
    for image in (np.full((300, 300), 255, np.uint8), np.zeros((5, 5), np.uint8), noise):
        assert not prepared(encode(image)).any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 400), (400, 1), (2, 3)])
def test_extreme_shapes_are_laid_out(shape: tuple[int, int]) -> None:
    """Images of one pixel, one row or one column give an image of the model's size."""
    assert prepared(encode(np.full(shape, 77, np.uint8))).shape == (28, 28)


def test_none_refuses_another_size() -> None:
    """preprocess=none says which size came and which the model takes."""
    with pytest.raises(InvalidInput) as refused:
        prepared(encode(np.zeros((30, 29), np.uint8)), preprocess="none")
    assert refused.value.received == "29x30 pixels"
    assert "28x28" in str(refused.value.expected)


def test_centre_is_refused_where_images_are_not_centred() -> None:
    """A model without centring has no box to centre into."""
    with pytest.raises(InvalidInput, match="not centred"):
        prepared(encode(glyph()), PLAIN, "centre")


def test_a_model_without_centring_only_resizes() -> None:
    """Grey or colour, the image fills the frame, in its own polarity."""
    grey = prepared(encode(np.full((90, 60), 200, np.uint8)), PLAIN)
    assert (grey.shape, grey.min(), grey.max()) == ((28, 28), 200, 200)
    halves = np.zeros((64, 64, 3), np.uint8)
    halves[:, :32] = (255, 0, 0)
    halves[:, 32:] = (0, 0, 255)
    colour = prepared(encode(halves), COLOUR)
    assert colour.shape == (32, 32, 3)
    assert colour[16, 4].tolist() == [255, 0, 0]
    assert colour[16, 28].tolist() == [0, 0, 255]


def test_grey_becomes_colour_for_a_colour_model() -> None:
    """A grey image has three equal channels."""
    got = prepared(encode(np.full((32, 32), 90, np.uint8)), COLOUR)
    assert (got == 90).all()
    assert got.shape == (32, 32, 3)


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    """The levels of a 16-bit PNG are divided, so that half the range stays half the range."""
    deep = glyph().astype(np.uint16) * 257 // 2
    got = prepared(encode(deep), preprocess="none")
    np.testing.assert_allclose(got, glyph() // 2, atol=1)


@pytest.mark.parametrize("share", [1, 4, 20, 85])
def test_16_bits_are_the_same_levels_as_8(share: int) -> None:
    """With preprocess=none an image stays as dark as it is, however little of the range it takes."""
    dim = glyph() // share
    got = prepared(encode(dim.astype(np.uint16) * 257), preprocess="none")
    np.testing.assert_array_equal(got, dim)


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
@pytest.mark.parametrize("spec", [MNIST, PLAIN], ids=["centred", "plain"])
@pytest.mark.parametrize("size", [28, 56])
def test_16_bits_may_hold_fewer(bits: int, spec: ImageSpec, size: int) -> None:
    """Cameras write levels of fewer bits into 16: they are scaled by those that are in use."""
    full = (1 << bits) - 1
    levels = np.rint(glyph(size) / 255 * full).astype(np.uint16)
    expected = prepared(encode(glyph(size)), spec)
    np.testing.assert_allclose(prepared(encode(levels), spec).astype(int), expected, atol=1)


def test_a_level_that_eight_bits_cannot_hold_is_of_ten() -> None:
    """One level above 255 is a quarter of the range, and does not begin again at 0."""
    levels = np.where(glyph() > 0, 256, 0).astype(np.uint16)
    assert prepared(encode(levels)).max() == 256 * 255 // 1023


@pytest.mark.parametrize(("ink", "sheet", "alpha"), [(0, 0, 0), (255, 255, 0), (0, 255, 9), (255, 0, 9)])
def test_transparency_is_put_on_what_the_ink_stands_out_from(ink: int, sheet: int, alpha: int) -> None:
    """Black or white strokes on a sheet that is all but transparent become the same digit."""
    rgba = np.full((28, 28, 4), sheet, np.uint8)
    rgba[glyph() > 0] = ink
    rgba[:, :, 3] = np.maximum(glyph(), alpha)
    expected = prepared(encode(glyph()), preprocess="centre" if ink == 0 else "auto")
    np.testing.assert_allclose(prepared(encode(rgba)).astype(int), expected, atol=1)


def test_a_palette_with_transparency_is_read() -> None:
    """A GIF-like image with a transparent colour has it replaced by the background."""
    image = Image.fromarray(np.where(glyph() > 0, 1, 0).astype(np.uint8), "P")
    image.putpalette([0, 0, 0, 255, 255, 255])
    file = io.BytesIO()
    image.save(file, "PNG", transparency=0)
    np.testing.assert_array_equal(prepared(file.getvalue()), glyph())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation: int) -> None:
    """A photograph is brought upright: the tag says where its first row and first column belong."""
    first_row, first_column = [  # Exif 2.32, table of tag 274
        ("top", "left"), ("top", "right"), ("bottom", "right"), ("bottom", "left"),
        ("left", "top"), ("right", "top"), ("right", "bottom"), ("left", "bottom"),
    ][orientation - 1]  # fmt: skip
    stored = upright = glyph()
    if "bottom" in (first_row, first_column):
        stored = stored[::-1]
    if "right" in (first_row, first_column):
        stored = stored[:, ::-1]
    if first_row in ("left", "right"):
        stored = stored.T
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(prepared(encode(stored, "PNG", exif=exif.tobytes())), upright)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_has_the_models_size_when_it_is_upright(orientation: int) -> None:
    """preprocess=none asks for the size that is seen, not for the one that the file has."""
    spec = PLAIN.model_copy(update={"width": 20})
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying, standing = np.zeros((20, 28), np.uint8), np.zeros((28, 20), np.uint8)
    fits, other = (lying, standing) if orientation > 4 else (standing, lying)
    assert prepared(encode(fits, "PNG", exif=exif.tobytes()), spec, "none").shape == (28, 20)
    with pytest.raises(InvalidInput) as refused:
        prepared(encode(other, "PNG", exif=exif.tobytes()), spec, "none")
    assert (refused.value.received, refused.value.expected) == (
        "28x20 pixels",
        "20x28 pixels, or preprocess=auto",
    )


def test_orientation_behind_the_rows_is_applied() -> None:
    """A PNG may say at its end how it is to be turned."""
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    body = b"eXIf" + turned.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    data = encode(glyph()[::-1, ::-1])
    data = data[:-12] + chunk + data[-12:]
    np.testing.assert_array_equal(prepared(data), glyph())
    same_at_once(data, MNIST)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_a_truncated_image_is_refused(image_format: str) -> None:
    """Half a file is refused, whatever its format, and the answer says that it breaks off."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 200), np.uint8)
    data = encode(noise, image_format)
    with pytest.raises(InvalidInput, match="cannot be decoded"):
        prepared(data[: len(data) // 2])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"%PDF-1.7",
        b"<svg/>",
        b"RIFF\x00\x00\x00\x00WEBP",
        bytes(99),
    ],
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    """Other bytes, and mere beginnings of images, are refused with what they begin with."""
    with pytest.raises(InvalidInput) as refused:
        prepared(data)
    assert "PNG" in str(refused.value.expected)
    assert refused.value.received


def outcome(data: bytes, spec: ImageSpec, preprocess: Preprocess, *, at_once: bool) -> Any:
    """Shape and pixels, or all that is said of the image."""
    try:
        pixels = prepare(open_image(data, MAX_PIXELS, at_once=at_once), spec, preprocess)
        return pixels.shape, pixels.tobytes()
    except (InvalidInput, TooLarge) as refusal:
        return refusal.detail, refusal.received, refusal.expected


def same_at_once(data: bytes, *specs: ImageSpec) -> None:
    for spec in specs:
        for preprocess in get_args(Preprocess):
            found, expected = (outcome(data, spec, preprocess, at_once=at_once) for at_once in (True, False))
            assert found == expected


def png_of(pixels: NDArray[np.uint8], header: bytes = b"", rows: bytes | None = None) -> bytes:
    """A PNG of nothing but rows and right checksums, whose header or compressed rows may be others."""
    data = encode(pixels)
    chunks = b"IHDR" + (header or data[16:29]), b"IDAT" + (data[41:-16] if rows is None else rows), b"IEND"
    return data[:8] + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


@pytest.mark.parametrize("colours", [(), (3,)], ids=["grey", "in colour"])
@pytest.mark.parametrize("size", [(28, 28), (32, 32), (28, 64), (64, 28), (1, 1), (65, 28), (28, 65)])
def test_a_png_of_nothing_but_rows_is_read_as_any_other(
    size: tuple[int, int], colours: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read at once, which only a small one is, gives the pixels that reading it as a file gives."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, *colours), np.uint8)
    for ground in (0, 255):  # on it the image may pass as it is
        pixels[0] = pixels[-1] = pixels[:, 0] = pixels[:, -1] = ground
        same_at_once(encode(pixels), MNIST, DARK, PLAIN, COLOUR)
    opened: list[object] = []
    monkeypatch.setattr(images, "_open", opened.append)
    for at_once in (True, False):
        with suppress(AttributeError):  # nothing was opened by that
            open_image(encode(pixels), MAX_PIXELS, at_once=at_once)
    assert len(opened) == 1 + (max(size) > 64)


def test_at_once_is_refused_what_is_refused_of_a_file() -> None:
    """Wherever a small PNG ends, and whatever it says of itself, the answer is the same either way."""
    rng = np.random.default_rng(0)
    for pixels in (glyph(), np.stack([glyph()] * 3, axis=-1)):
        data = encode(pixels)
        header, rows = data[16:29], zlib.decompress(data[41:-16])
        spoiled = [data[:end] for end in range(len(data))] + [data + b"\0"]
        spoiled += [
            data[:position] + bytes([value]) + data[position + 1 :]
            for position in range(len(data))
            for value in (0, 1, 255, data[position] ^ 1 << int(rng.integers(8)))
        ]
        # Depth, colours, compression, filters, interlacing.
        forms = itertools.product((1, 2, 4, 8, 16), (0, 2, 3, 4, 6), (0, 1), (0, 1), (0, 1))
        spoiled += [png_of(pixels, header[:8] + bytes(form)) for form in forms]
        sides = itertools.product((0, 1, 27, 29, 64, 65, 2**31, 2**32 - 1), repeat=2)
        spoiled += [png_of(pixels, struct.pack(">II", *size) + header[8:]) for size in sides]
        broken = rows[:-1], rows[:100], rows + rows, b"", rows + bytes(100_000), b"\7" + rows[1:]
        spoiled += [png_of(pixels, rows=zlib.compress(one)) for one in broken]
        whole = zlib.compress(rows)
        spoiled += [
            png_of(pixels, rows=one) for one in (whole[:-4], whole[:-1], whole + whole, whole[2:], b"")
        ]
        for one in spoiled:
            same_at_once(one, MNIST)


PSD = b"8BPS" + struct.pack(">H6xHIIHH", 1, 1, 28, 28, 8, 1) + bytes(3 * 4 + 2 + 28 * 28)


@pytest.mark.parametrize(
    "data",
    [encode(np.zeros((28, 28), np.uint8), name) for name in ("EPS", "TIFF", "PPM")] + [PSD],
    ids=["EPS", "TIFF", "PPM", "PSD"],
)
def test_other_formats_are_not_even_opened(data: bytes) -> None:
    """Images that Pillow could read, EPS by a program of its own, are refused by their first bytes."""
    assert Image.open(io.BytesIO(data)).size == (28, 28)
    with pytest.raises(InvalidInput, match="cannot be decoded"):
        open_image(data, MAX_PIXELS)


def test_damage_anywhere_is_refused_or_harmless() -> None:
    """Whichever bytes are changed, an image or an InvalidInput comes out, and nothing else."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (40, 40, 3), np.uint8)
    for image_format in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
        data = encode(noise, image_format)
        for _ in range(100):
            damaged = bytearray(data)
            for position in rng.integers(0, len(data), 3):
                damaged[position] = rng.integers(0, 256)
            try:
                assert prepared(bytes(damaged)).shape == (28, 28)
            except (InvalidInput, TooLarge):
                continue


def test_a_side_that_is_too_long_is_refused() -> None:
    """A PNG of a million rows costs far more than its pixels; of 65,535 it is read."""
    with pytest.raises(TooLarge, match="too long"):
        open_image(encode(np.zeros((65_536, 1), np.uint8)), MAX_PIXELS)
    assert open_image(encode(np.zeros((65_535, 1), np.uint8)), MAX_PIXELS).size == (1, 65_535)


def test_a_bomb_is_refused_by_its_header() -> None:
    """20,000 x 20,000 pixels in 400 KB are refused without a pixel being decoded."""
    bomb = png_bomb(20_000, 20_000)
    assert len(bomb) < 1_000_000
    tracemalloc.start()
    with pytest.raises(TooLarge) as refused:
        open_image(bomb, MAX_PIXELS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused.value.received == "20000x20000 = 400000000 pixels"
    assert peak < 5_000_000


def test_the_pixel_limit_is_met_exactly() -> None:
    """An image of exactly the limit passes; one pixel row more does not."""
    open_image(png_bomb(100, 50), 5000)
    with pytest.raises(TooLarge):
        open_image(png_bomb(100, 51), 5000)


def test_a_large_photograph_is_decoded_at_a_fraction_of_its_size() -> None:
    """A JPEG is brought to the working size while it is decoded, which bounds time and memory."""
    opened = open_image(encode(np.zeros((1600, 2400), np.uint8), "JPEG"), MAX_PIXELS)
    prepare(opened, MNIST, "auto")
    assert max(opened.size) <= 600


def test_a_large_model_gets_all_that_it_can_take() -> None:
    """For a network of 512 pixels a JPEG of 1,024 is halved, whose stripes of two pixels stay stripes."""
    stripes = np.tile(np.repeat(np.array([0, 255], np.uint8), 2), (1024, 256))
    spec = PLAIN.model_copy(update={"height": 512, "width": 512})
    assert np.ptp(prepared(encode(stripes, "JPEG", quality=95), spec)) > 200


def test_base64_and_data_urls_are_read() -> None:
    """Plain base64, base64 in lines, and data URLs, their words in any case, give the same bytes."""
    data = bytes(range(256))
    text = base64_text(data)
    lines = "\r\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    urls = [f"data:image/png;base64,{text}", f"Data:image/png;BASE64,{text}"]
    for form in (text, lines, lines.replace("\r", ""), *urls):
        assert decode_base64(form) == data


@pytest.mark.parametrize(
    "text", ["not base64!", "AAA", "AA=A", "data:image/png,AAAA", "data:;base64,%%", "data:", "ÄÖÜ="]
)
def test_broken_base64_is_refused(text: str) -> None:
    """Whatever is not strict base64 is refused with its beginning."""
    with pytest.raises(InvalidInput) as refused:
        decode_base64(text)
    assert "base64" in str(refused.value.expected)


@pytest.mark.parametrize(
    "read",
    [
        lambda: decode_base64("%" * 9999),
        lambda: decode_base64(f"data:{'x' * 9999},"),
        lambda: open_image(bytes(9999), MAX_PIXELS),
        lambda: read_npy(
            npy_with_header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({'1, ' * 2000})}}"),
            (28, 28),
            max_images=10,
        ),
    ],
    ids=["base64", "data_url", "bytes", "npy"],
)
def test_an_error_repeats_little_of_what_was_sent(read: Callable[[], object]) -> None:
    """However long a refused text is, two hundred characters at most come back."""
    with pytest.raises(InvalidInput) as refused:
        read()
    assert len(str(refused.value.received)) <= 200


@pytest.mark.parametrize("fortran", [False, True])
def test_an_npy_array_is_read(fortran: bool) -> None:
    """uint8 (N, H, W) comes back as it was saved, in either memory order."""
    array = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    saved = npy(np.asfortranarray(array) if fortran else array)
    got = read_npy(saved, (28, 28), max_images=3)
    np.testing.assert_array_equal(got, array)
    assert got.flags.c_contiguous


@pytest.mark.parametrize(
    ("data", "received"),
    [
        (npy(np.zeros((1, 28, 28), np.float32)), "float32 (1, 28, 28)"),
        (npy(np.zeros((1, 28, 28), np.int8)), "int8 (1, 28, 28)"),
        (npy(np.zeros((1, 27, 28), np.uint8)), "uint8 (1, 27, 28)"),
        (npy(np.zeros((28, 28), np.uint8)), "uint8 (28, 28)"),
        (npy(np.zeros((0, 28, 28), np.uint8)), "uint8 (0, 28, 28)"),
        (npy(np.zeros((), np.uint8)), "uint8 ()"),
        (npy(np.array([print], object), allow_pickle=True), "object (1,)"),
        (npy(np.zeros((2, 28, 28), np.uint8))[:-1], "1567 bytes of data"),
        (npy(np.zeros((2, 28, 28), np.uint8)) + b"x", "1569 bytes of data"),
        (
            npy_with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 28, 28)}"),
            "uint8 (-1, 28, 28)",
        ),
        (
            npy_with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (True, 28, 28)}") + bytes(784),
            "uint8 (True, 28, 28)",
        ),
    ],
)
def test_an_npy_array_of_another_form_is_refused(data: bytes, received: str) -> None:
    """A wrong dtype, shape or length is refused with what came, and nothing is ever unpickled."""
    with pytest.raises(InvalidInput) as refused:
        read_npy(data, (28, 28), max_images=10)
    assert refused.value.received == received


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x09\x00\x10\x00" + bytes(16),
        b"PK\x03\x04",
        npy_with_header("{"),
        npy_with_header("(" * 5000),
        npy_with_header("__import__('os').abort()"),
        npy_with_header("{'descr': '|u1', 'fortran_order': False, 'shape': 'big'}"),
        npy_with_header("{'descr': 'nonsense', 'fortran_order': False, 'shape': (1, 28, 28)}"),
        npy_with_header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': (0x{'f' * 9000}, 28, 28)}}"),
        npy_with_header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': (1, 0x{'f' * 9000}, 28)}}"),
    ],
)
def test_what_is_no_npy_file_is_refused(data: bytes) -> None:
    """A broken or hostile header is refused as no npy file."""
    with pytest.raises(InvalidInput, match="not an npy file"):
        read_npy(data, (28, 28), max_images=10)


def test_a_huge_npy_promise_allocates_nothing() -> None:
    """A header that promises terabytes over a few bytes is refused before any memory is taken for it."""
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 28, 28)}"
    with pytest.raises(InvalidInput, match="length"):
        read_npy(npy_with_header(header, b"xx"), (28, 28), max_images=10**12)


def test_too_many_npy_images_are_refused() -> None:
    """The limit is met exactly, and one more is too many."""
    read_npy(npy(np.zeros((4, 28, 28), np.uint8)), (28, 28), max_images=4)
    with pytest.raises(TooLarge):
        read_npy(npy(np.zeros((5, 28, 28), np.uint8)), (28, 28), max_images=4)


def test_levels_are_rounded() -> None:
    """Each level is written as the whole one that it is nearest to."""
    levels = np.arange(256)
    for off in (-0.4, 0, 0.4):
        values = ((levels + off) / 255).clip(0, 1).astype(np.float32)
        np.testing.assert_array_equal(to_uint8(values), levels)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_a_png_carries_every_pixel(shape: tuple[int, ...], large: bool) -> None:
    """What is encoded is what is decoded, in grey and in colour, with and without filters."""
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    found = Image.open(io.BytesIO(encode_png(pixels, large=large)))
    np.testing.assert_array_equal(np.asarray(found.convert("RGB" if pixels.ndim == 3 else "L")), pixels)
