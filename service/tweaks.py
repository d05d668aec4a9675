"""Moving single dimensions of a capsule."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_COMPONENT = 10.0
"""Largest absolute component, delta or value that is taken. A squashed capsule is shorter than 1; this
leaves room to play and keeps the decoder's sums finite."""


@dataclass(frozen=True, slots=True)
class Tweak:
    """Moves one dimension by `delta`, or sets it to `value`; exactly one of the two is given."""

    dimension: int
    delta: float | None = None
    value: float | None = None


def apply_tweaks(capsules: NDArray[np.float32], index: int, tweaks: Sequence[Tweak]) -> NDArray[np.float32]:
    """A copy of `capsules` (classes, dimensions) with the tweaks done in order to row `index`."""
    tweaked = capsules.copy()
    for tweak in tweaks:
        if tweak.value is not None:
            tweaked[index, tweak.dimension] = tweak.value
        elif tweak.delta is not None:
            tweaked[index, tweak.dimension] += tweak.delta
    return tweaked


def sweep_capsules(
    capsules: NDArray[np.float32], index: int, dimensions: Sequence[int], deltas: Sequence[float]
) -> NDArray[np.float32]:
    """Every dimension moved by every delta: (len(dimensions) * len(deltas), classes, dimensions)."""
    swept = np.tile(capsules, (len(dimensions), len(deltas), 1, 1))
    for row, dimension in enumerate(dimensions):
        swept[row, :, index, dimension] += np.asarray(deltas, np.float32)
    return swept.reshape(-1, *capsules.shape)


def default_deltas(tweak_range: tuple[float, float], step: float) -> list[float]:
    """Deltas from one end of the range to the other; the paper's figure 4 has -0.25 … 0.25 by 0.05."""
    low, high = tweak_range
    count = round((high - low) / step) + 1
    return [round(float(delta), 6) for delta in np.linspace(low, high, count)]
