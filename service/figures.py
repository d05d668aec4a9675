"""The labelled grid of the paper's figure 4: one row for each dimension, one column for each delta."""

from collections.abc import Sequence
from functools import cache, lru_cache
from math import ceil

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from service.images import to_uint8

_TILE = 56  # pixels: a 28x28 image at twice its size
_GAP = 2
_MARGIN = 48  # above the columns and, at least, left of the rows, for labels
_FONT_SIZE = 14
_LINE = 20  # pixels, with room below for letters like g


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_FONT_SIZE)


def sweep_figure(
    reconstructions: NDArray[np.float32],
    title: str,
    dimensions: Sequence[int],
    deltas: Sequence[float],
    names: Sequence[str] = (),
) -> NDArray[np.uint8]:
    """Draw (dimensions, deltas, H, W[, 3]) reconstructions in [0, 1] as one labelled figure (h, w[, 3]).

    `names`, one for each dimension, stand before their numbers.
    """
    rows, columns, height, width = reconstructions.shape[:4]
    zoom = max(1, _TILE // max(height, width))
    tiles = to_uint8(reconstructions).repeat(zoom, axis=2).repeat(zoom, axis=3)
    step_y, step_x = height * zoom + _GAP, width * zoom + _GAP
    texts = [f"{name}  {d}" for name, d in zip(names, dimensions, strict=True)] if names else dimensions
    beside = [_label(str(text)) for text in texts]
    left = max(_MARGIN, max(label.shape[1] for label in beside) + 4 * _GAP)
    mosaic = np.full(
        (_MARGIN + rows * step_y, left + columns * step_x, *reconstructions.shape[4:]), 255, np.uint8
    )
    for row in range(rows):
        for column in range(columns):
            y, x = _MARGIN + row * step_y, left + column * step_x
            mosaic[y : y + height * zoom, x : x + width * zoom] = tiles[row, column]
    _put(mosaic, _label(title), _GAP, _GAP)
    for column, delta in enumerate(deltas):
        label = _label(f"{delta:+.4g}" if delta else "0")
        x = left + column * step_x + (width * zoom - label.shape[1]) // 2
        _put(mosaic, label, _MARGIN - _GAP - label.shape[0], x)
    for row, label in enumerate(beside):
        y = _MARGIN + row * step_y + (height * zoom - label.shape[0]) // 2
        _put(mosaic, label, y, left - 2 * _GAP - label.shape[1])
    return mosaic


@lru_cache(1024)  # of a few hundred bytes each; drawing them anew costs as much as decoding a whole sweep
def _label(text: str) -> NDArray[np.uint8]:
    """Black text on white, (h, w), as high as any other."""
    font = _font()
    image = Image.new("L", (ceil(font.getlength(text)), _LINE), 255)
    ImageDraw.Draw(image).text((0, 0), text, 0, font)
    return np.asarray(image)


def _put(mosaic: NDArray[np.uint8], label: NDArray[np.uint8], y: int, x: int) -> None:
    """Write a label into grey or colour (h, w[, 3]); what does not fit is cut off."""
    place = mosaic[y : y + label.shape[0], x : x + label.shape[1]]
    label = label[: place.shape[0], : place.shape[1]]
    place[...] = label if place.ndim == 2 else label[..., np.newaxis]
