"""The labelled grid of the paper's figure 4: one row for each dimension, one column for each delta."""

from collections.abc import Sequence
from functools import cache
from math import ceil

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from service.images import to_uint8

_TILE = 56  # pixels: a 28x28 picture at twice its size
_GAP = 2
_MARGIN = 48  # above the columns and, at least, left of the rows, for labels
_FONT_SIZE = 14


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
    """Draw (dimensions, deltas, H, W[, 3]) pictures in [0, 1] as one labelled picture (h, w[, 3]).

    `names`, one for each dimension, stand before their numbers.
    """
    rows, columns, height, width = reconstructions.shape[:4]
    zoom = max(1, _TILE // max(height, width))
    tiles = to_uint8(reconstructions).repeat(zoom, axis=2).repeat(zoom, axis=3)
    step_y, step_x = height * zoom + _GAP, width * zoom + _GAP
    colour = reconstructions.shape[4:]
    labels = [f"{name}  {d}" for name, d in zip(names, dimensions, strict=True)] if names else dimensions
    widest = max(_font().getlength(str(label)) for label in labels)
    left = max(_MARGIN, ceil(widest) + 4 * _GAP)
    mosaic = np.full((_MARGIN + rows * step_y, left + columns * step_x, *colour), 255, np.uint8)
    for row in range(rows):
        for column in range(columns):
            y, x = _MARGIN + row * step_y, left + column * step_x
            mosaic[y : y + height * zoom, x : x + width * zoom] = tiles[row, column]
    image = Image.fromarray(mosaic)
    draw = ImageDraw.Draw(image)
    black = (0, 0, 0) if colour else 0
    draw.text((_GAP, _GAP), title, black, _font())
    for column, delta in enumerate(deltas):
        x = left + column * step_x + width * zoom // 2
        draw.text((x, _MARGIN - _GAP), f"{delta:+.4g}" if delta else "0", black, _font(), anchor="mb")
    for row, label in enumerate(labels):
        y = _MARGIN + row * step_y + height * zoom // 2
        draw.text((left - 2 * _GAP, y), str(label), black, _font(), anchor="rm")
    return np.asarray(image)
