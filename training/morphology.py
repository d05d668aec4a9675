"""Stroke thickness, slant, width and height of drawings.

As Castro et al. define them in "Morpho-MNIST: Quantitative Assessment and Diagnostics for Representation
Learning" (2019), with the amount of ink and its place beside them.
"""

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from skimage.morphology import skeletonize
from torch.nn import functional

from service.manifest import Measure
from training.predictor import Floats

UNITS: Final[dict[Measure, str]] = {
    "thickness": "px",
    "slant": "°",  # growing to the right
    "width": "px",
    "height": "px",
    "ink": "%",  # of the untweaked drawing's, in the manifest; here in pixels full of it
    "across": "px",  # the centre of mass
    "down": "px",
}
MEASURES: Final = tuple(UNITS)
SCALE = 4
"""Drawings are enlarged so much before they are cut into ink and ground, as Morpho-MNIST's are."""
ENOUGH = 4 * 28
"""Pixels on the longer side up to which they are; larger ones are fine as they are, and cost time."""
TAILS = (0.02, 0.98)
"""Quantiles of the ink between which width and height are taken, so that a speck does not count."""


def measure(drawings: Floats) -> NDArray[np.float64]:
    """Light drawings on dark ground (N, H, W) -> every measure of each, (N, 7); NaN without ink."""
    scale = max(1, min(SCALE, -(-ENOUGH // max(drawings.shape[1:]))))
    large = functional.interpolate(torch.from_numpy(drawings)[:, None], scale_factor=scale, mode="bicubic")
    levels = large[:, 0].numpy()
    darkest, lightest = levels.min(axis=(1, 2), keepdims=True), levels.max(axis=(1, 2), keepdims=True)
    # A border of ground keeps the drawings apart when they are laid one below the other.
    inked = np.pad(levels > (darkest + lightest) / 2, ((0, 0), (1, 1), (1, 1)))
    column = inked.reshape(-1, inked.shape[2])
    depth = distance_transform_edt(column).reshape(inked.shape) / scale  # to the nearest ground
    spine = skeletonize(column).reshape(inked.shape)
    y, x = ((np.indices(inked.shape[1:]) - 0.5) / scale)[:, None]  # (1, h, w) each
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN where there is no ink
        thickness = 2 * _mean(depth, spine)
        across, down = _mean(x, inked), _mean(y, inked)
        from_left, from_top = x - across[:, None, None], y - down[:, None, None]
        shear = _mean(from_left * from_top, inked) / _mean(from_top**2, inked)  # pixels to the right per row
    upright = from_left - shear[:, None, None] * from_top
    return np.stack(
        [
            thickness,
            np.degrees(np.arctan(-shear)),
            _extent(upright, inked),
            _extent(np.broadcast_to(y, inked.shape), inked),
            drawings.sum(axis=(1, 2)),
            across,
            down,
        ],
        axis=1,
    )


def _mean(values: NDArray[np.float64], where: NDArray[np.bool_]) -> NDArray[np.float64]:
    mean: NDArray[np.float64] = (values * where).sum(axis=(1, 2)) / where.sum(axis=(1, 2))
    return mean


def _extent(places: NDArray[np.float64], inked: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Between which places, (N, h, w), the ink of each drawing lies, but for its tails."""
    ends = [
        np.quantile(place[ink], TAILS) if ink.any() else [np.nan] * 2
        for place, ink in zip(places, inked, strict=True)
    ]
    return np.diff(ends, axis=1)[:, 0]
