"""What each dimension of a class's capsule means: measured on drawings, and put into words.

A dimension is moved through the tweak range for some images of the class, with everything else of their
capsules kept. What that does to the drawing is told in two ways: how each measure of `training.morphology`
changes, and what share of the squared change a pure change of one kind accounts for. The first gives the
figures; the second the name, since shares can be compared with one another, and pixels and degrees cannot.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from service.manifest import Dimension, Dimensions, Effect, Measure
from training import data
from training.compose import as_seen
from training.config import TWEAK_RANGE
from training.data import Dataset
from training.morphology import MEASURES, measure
from training.predictor import Floats, Predictor

IMAGES = 30
"""Images of each class that are looked at: the first of its training images that are recognised."""
DELTAS: Final = np.linspace(*TWEAK_RANGE, 5, dtype=np.float32)
AGREEMENT = 0.8
"""Share of the images in which an effect must go the same way to be one."""
LITTLE = 0.02
"""Squared change, as a share of the drawing's squared light, below which a dimension has little effect."""
NOTABLE = 0.05
"""Least share of the squared change that is told."""
MOST_NOUNS = 4
"""In a name; one, unless others of the class begin alike."""
NOT_MEASURED = "not measured: none of the training images tried was recognised"
LITTLE_EFFECT = "little effect"
NO_ONE_EFFECT = "no one effect"
"""Name of a dimension that changes the drawing, but each image in its own way."""

NOUNS: Final[dict[Measure, str]] = {
    "thickness": "stroke thickness",
    "slant": "slant",
    "width": "width",
    "height": "height",
    "ink": "amount of ink",
    "across": "horizontal position",
    "down": "vertical position",
}
PARTS: Final = (
    ("top left part", "top part", "top right part"),
    ("left part", "middle part", "right part"),
    ("bottom left part", "bottom part", "bottom right part"),
)

Doubles = NDArray[np.float64]


def measure_dimensions(
    predictor: Predictor,
    dataset: Dataset,
    *,
    light_on_dark: bool = True,
    images: int = IMAGES,
    say: Callable[[str], None] = print,
) -> Dimensions:
    """Measure and name every dimension of every class; none for images of several digits.

    A class is left out if none of its first `2 * images` images is recognised, and `say` tells which.

    Args:
        dataset: the training images, so that nothing is chosen on the test images.
    """
    if dataset.layout == "pairs" or dataset.labels.ndim == 2:
        return {}
    found = {}
    for k, label in enumerate(predictor.classes):
        if recognised := _recognised(predictor, dataset, k, images):
            swept = (sweep(predictor, one, k, DELTAS) for one in recognised)
            found[label] = describe([look(as_light(drawings, light_on_dark)) for drawings in swept])
        else:
            say(f"class {label}: dimensions {NOT_MEASURED}")
    return found


def _recognised(predictor: Predictor, dataset: Dataset, target: int, most: int) -> list[Floats]:
    """Capsules (K, D) of up to `most` images that are taken for their class, of its first `2 * most`."""
    some = torch.nonzero(dataset.labels == target)[: 2 * most, 0]
    if not len(some):
        return []
    capsules, lengths = predictor.encode(as_seen(data.take(dataset, some)).images.cpu().numpy())
    return list(capsules[lengths.argmax(axis=1) == target][:most])


def sweep(predictor: Predictor, capsules: Floats, target: int, deltas: Floats) -> Floats:
    """Move each dimension of one image's capsules (K, D) by `deltas`: drawings, (D, deltas, H, W[, 3])."""
    dimensions = capsules.shape[1]
    changed = np.tile(capsules, (dimensions, len(deltas), 1, 1))
    for dimension in range(dimensions):
        changed[dimension, :, target, dimension] += deltas
    rows = changed.reshape(-1, *capsules.shape)
    drawn = predictor.decode(rows, np.full(len(rows), target))
    return drawn.reshape(dimensions, len(deltas), *drawn.shape[1:])


def as_light(drawings: Floats, light_on_dark: bool) -> Floats:
    """Drawings (D, deltas, H, W[, 3]) in grey, their ink light: (D, deltas, H, W)."""
    grey: Floats = drawings if drawings.ndim == 4 else drawings.mean(axis=-1)
    return grey if light_on_dark else 1 - grey


@dataclass(frozen=True)
class Look:
    """What the sweep of one image shows, for each of its D dimensions."""

    changes: Doubles
    """Of every measure over the tweak range, (D, measures); NaN where a drawing has no ink."""
    moved: Doubles
    """Squared change between the ends, over the squared light in the middle, (D,)."""
    kinds: Doubles
    """Share of the squared change that a pure and steady change of each measure explains, (D, measures);
    negative where the measure shrinks."""
    parts: Doubles
    """Share of it that all pure changes leave together, by ninth of the ink's bounding box, (D, 3, 3)."""


def look(drawings: Floats) -> Look:
    """Measure one image's sweep, (D, deltas, H, W)."""
    dimensions, deltas, height, width = drawings.shape
    middle = drawings[0, deltas // 2].astype(np.float64)  # the same in every row
    measured = measure(drawings.reshape(-1, height, width)).reshape(dimensions, deltas, -1)
    centred = DELTAS - DELTAS.mean()
    slope = np.einsum("ijk,j->ik", measured, centred / (centred**2).sum())  # of the least-squares line
    changes = slope * np.ptp(DELTAS)
    with np.errstate(invalid="ignore", divide="ignore"):  # where nothing was drawn
        changes[:, MEASURES.index("ink")] *= 100 / middle.sum()
    moved = ((drawings[:, -1] - drawings[:, 0]).astype(np.float64) ** 2).sum(axis=(1, 2))
    moved /= max((middle**2).sum(), np.finfo(float).eps)
    kinds, rest = explain(drawings)
    rows, columns = thirds(middle)
    parts = np.add.reduceat(np.add.reduceat(rest, rows, axis=1), columns, axis=2)
    return Look(changes, moved, kinds, parts)


def explain(drawings: Floats) -> tuple[Doubles, Doubles]:
    """Shares of the squared change from delta to delta: of each pure change, and of the rest at each pixel.

    Args:
        drawings: (D, deltas, H, W).

    Returns:
        For each measure what it explains alone, at one rate from end to end, (D, measures), negative where it
        shrinks; and what all of them together leave, each step at rates of its own, (D, H, W).
    """
    steps = np.diff(drawings.astype(np.float64), axis=1)
    halfway = (drawings[:, 1:] + drawings[:, :-1]).astype(np.float64) / 2
    size = drawings.shape[2] * drawings.shape[3]
    basis = tangents(halfway).reshape(*steps.shape[:2], len(MEASURES), size)
    flat = steps.reshape(*steps.shape[:2], size)
    gram = basis @ basis.swapaxes(-1, -2)  # (D, steps, measures, measures)
    along = (basis @ flat[..., None])[..., 0]
    own = np.diagonal(gram, axis1=-2, axis2=-1)
    rate = np.divide(along, np.sqrt(own), out=np.zeros_like(along), where=own > 0).mean(axis=1)
    together = np.linalg.pinv(gram, rcond=1e-6, hermitian=True) @ along[..., None]
    left = (flat - (basis * together).sum(axis=2)) ** 2
    total = (flat**2).sum(axis=(1, 2))
    total[total == 0] = np.inf  # nothing changed, and everything has no share in it
    alone = rate * np.abs(rate) * steps.shape[1] / total[:, None]
    return alone, (left.sum(axis=1) / total[:, None]).reshape(-1, *drawings.shape[2:])


def tangents(drawings: Doubles) -> Doubles:
    """How drawings (…, H, W) begin to change when one measure alone grows: (…, measures, H, W).

    The tangent vectors of Simard, LeCun, Denker and Victorri, "Transformation invariance in pattern
    recognition: tangent distance and tangent propagation" (1998). That of the ink is what of its brightness
    is not thickness, since a thin stroke is dim as well.
    """
    y, x = np.indices(drawings.shape[-2:], dtype=np.float64)
    weight = drawings / np.maximum(drawings.sum(axis=(-2, -1), keepdims=True), np.finfo(float).tiny)
    from_top = y - (weight * y).sum(axis=(-2, -1), keepdims=True)
    from_left = x - (weight * x).sum(axis=(-2, -1), keepdims=True)
    down, across = (np.asarray(slope) for slope in np.gradient(drawings, axis=(-2, -1)))
    thickness = np.hypot(across, down)  # every edge moves outwards as fast
    both, own = (thickness * drawings).sum(axis=(-2, -1)), (thickness**2).sum(axis=(-2, -1))
    overlap = np.divide(both, own, out=np.zeros_like(own), where=own > 0)[..., None, None]
    pure: dict[Measure, Doubles] = {
        "thickness": thickness,
        "slant": across * from_top,
        "width": -across * from_left,
        "height": -down * from_top,
        "ink": drawings - overlap * thickness,
        "across": -across,
        "down": -down,
    }
    return np.stack([pure[name] for name in MEASURES], axis=-3)


def thirds(drawing: Doubles) -> tuple[list[int], list[int]]:
    """Rows and columns where the thirds of the ink's bounding box begin; the outer ones have no end."""
    inked = drawing > (drawing.min() + drawing.max()) / 2
    return _starts(inked.any(axis=1)), _starts(inked.any(axis=0))


def _starts(inked: NDArray[np.bool_]) -> list[int]:
    places = np.flatnonzero(inked) if inked.any() else np.arange(len(inked))
    first, extent = places[0], places[-1] + 1 - places[0]
    second = min(max(round(first + extent / 3), 1), len(inked) - 2)
    third = min(max(round(first + 2 * extent / 3), second + 1), len(inked) - 1)
    return [0, second, third]


def describe(looks: Sequence[Look]) -> tuple[Dimension, ...]:
    """Figures and a name for each dimension of a class, from some images of it."""
    moved = np.mean([look.moved for look in looks], axis=0)
    effects = [_effects(np.stack([look.changes[d] for look in looks])) for d in range(len(moved))]
    shares = [
        _shares(
            np.mean([look.kinds[d] for look in looks], axis=0),
            np.mean([look.parts[d] for look in looks], axis=0),
            effects[d],
        )
        for d in range(len(moved))
    ]
    names = distinguish(
        [
            (list(kinds) or [NO_ONE_EFFECT]) if amount >= LITTLE else [LITTLE_EFFECT]
            for kinds, amount in zip(shares, moved, strict=True)
        ],
        [_falls(kinds, of) for kinds, of in zip(shares, effects, strict=True)],
    )
    return tuple(
        Dimension(name=name, moved=_brief(amount), effects=of, shares=kinds)
        for name, amount, of, kinds in zip(names, moved, effects, shares, strict=True)
    )


def _effects(changes: Doubles) -> dict[Measure, Effect]:
    """What goes the same way in nearly all images, by the changes (images, measures)."""
    effects: dict[Measure, Effect] = {}
    for name, column in zip(MEASURES, changes.T, strict=True):
        known = column[np.isfinite(column)]
        change = _brief(known.mean()) if len(known) else 0.0
        agreement = float(np.mean(np.sign(known) == np.sign(change))) if change else 0.0
        if agreement >= AGREEMENT:
            effects[name] = Effect(change=change, agreement=round(agreement, 2))
    return effects


def _shares(kinds: Doubles, parts: Doubles, effects: Mapping[Measure, Effect]) -> dict[str, float]:
    """Notable shares by noun, largest first: of effects that were found, and of the part with most change."""
    told = {
        NOUNS[name]: np.sign(effects[name].change) * share  # the drawing and the measure must agree
        for name, share in zip(MEASURES, kinds, strict=True)
        if name in effects
    }
    row, column = np.unravel_index(parts.argmax(), parts.shape)
    told[PARTS[row][column]] = parts[row, column]
    order = sorted(told, key=lambda noun: -told[noun])
    return {noun: round(float(told[noun]), 2) for noun in order if told[noun] >= NOTABLE}


def _falls(shares: Mapping[str, float], effects: Mapping[Measure, Effect]) -> bool:
    """Whether the weightiest of the shares is of a measure that becomes less."""
    first = next(iter(shares), None)
    return any(NOUNS[name] == first and effect.change < 0 for name, effect in effects.items())


def distinguish(nouns: Sequence[Sequence[str]], falls: Sequence[bool]) -> list[str]:
    """A name for each dimension, of as many of its nouns, weightiest first, as set it apart from the others.

    Up to `MOST_NOUNS`. Where that does not do, those whose first effect `falls` are called reversed, if
    they have one; names that are the same even then stay so.
    """
    counts = [1] * len(nouns)
    for _ in range(MOST_NOUNS - 1):
        names = [_join(some[:count]) for some, count in zip(nouns, counts, strict=True)]
        often = Counter(names)
        counts = [count + (often[name] > 1) for count, name in zip(counts, names, strict=True)]
    names = [_join(some[:count]) for some, count in zip(nouns, counts, strict=True)]
    often = Counter(names)
    return [
        f"{name}, reversed"
        if often[name] > 1 and fall and some[0] not in (LITTLE_EFFECT, NO_ONE_EFFECT)
        else name
        for name, fall, some in zip(names, falls, nouns, strict=True)
    ]


def _join(nouns: Sequence[str]) -> str:
    *first, last = nouns
    return f"{', '.join(first)} and {last}" if first else last


def _brief(number: float) -> float:
    """Three digits, and no more than two decimals."""
    return round(float(f"{number:.3g}"), 2)
