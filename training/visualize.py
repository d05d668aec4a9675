"""Pictures of what a network sees: reconstructions, and the continuous change of each capsule dimension."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from service.manifest import Dimensions
from training.config import TWEAK_RANGE, TWEAK_STEP
from training.data import DataError, Dataset
from training.dimensions import AGREEMENT, NOUNS
from training.morphology import UNITS
from training.predictor import Predictor

mpl.use("Agg")  # files only: no window, no display needed


def draw_reconstructions(predictor: Predictor, dataset: Dataset, path: Path, columns: int = 12) -> None:
    """Draw pictures above their reconstructions: some of every class, then mistakes, as in figure 3.

    Each column is titled (label, prediction).
    """
    images = dataset.images.numpy()
    labels = dataset.labels.numpy()
    capsules, lengths = _encode_all(predictor, images)
    predictions = lengths.argmax(axis=-1)
    right = _spread(labels, np.flatnonzero(predictions == labels), columns)
    wrong = np.flatnonzero(predictions != labels)[:columns]
    rows = [row for row in (right, wrong) if len(row)]
    figure = Figure(figsize=(columns, 2.5 * len(rows)), layout="constrained")
    axes = figure.subplots(2 * len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, row in enumerate(rows):
        pictures = predictor.decode(capsules[row], predictions[row])
        for j, index in enumerate(row):
            _show(axes[2 * i, j], images[index] / 255)
            _show(axes[2 * i + 1, j], pictures[j])
            axes[2 * i, j].set_title(
                f"{dataset.classes[labels[index]]}, {dataset.classes[predictions[index]]}",
                fontsize=9,
                color="black" if labels[index] == predictions[index] else "firebrick",
            )
    figure.suptitle("input above reconstruction; (label, prediction)", fontsize=10)
    figure.savefig(path, dpi=110)


def draw_pairs(predictor: Predictor, dataset: Dataset, path: Path, columns: int = 12) -> None:
    """Draw pictures of two digits above what is drawn from their two longest capsules, each by itself.

    As in figure 5, rightly recognised pictures first, then mistakes; the second row lays both drawings over
    one another, the one in red, the other in green.
    """
    images, labels = dataset.images.numpy(), np.sort(dataset.labels.numpy(), axis=1)
    capsules, lengths = _encode_all(predictor, images)
    predictions = np.sort(np.argsort(lengths, axis=1)[:, -2:], axis=1)
    missed = (predictions != labels).any(axis=1)
    chosen = np.concatenate([np.flatnonzero(~missed)[: columns // 2], np.flatnonzero(missed)])[:columns]
    figure = Figure(figsize=(columns, 5), layout="constrained")
    axes = figure.subplots(4, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    drawn = np.stack([predictor.decode(capsules[chosen], predictions[chosen, k]) for k in (0, 1)], axis=1)
    for column, (index, (first, second)) in enumerate(zip(chosen, drawn, strict=True)):
        both = np.stack([first, second, np.zeros_like(first)], axis=-1)
        for row, picture in enumerate((images[index] / 255, both, first, second)):
            _show(axes[row, column], picture)
        names = ["".join(dataset.classes[k] for k in pair[index]) for pair in (labels, predictions)]
        axes[0, column].set_title(
            ", ".join(names), fontsize=9, color="firebrick" if missed[index] else "black"
        )
    figure.suptitle("input, both reconstructions, each of them; (labels, predictions)", fontsize=10)
    figure.savefig(path, dpi=110)


def draw_dimensions(
    predictor: Predictor, dataset: Dataset, label: str, path: Path, names: Sequence[str] = ()
) -> None:
    """Draw figure 4 for one picture of class `label`: a row for each dimension, a column for each change.

    Args:
        names: what each dimension means, to stand beside its row.

    Raises:
        DataError: if the network does not know the class.
    """
    index, target = typical(predictor, dataset, label)
    capsules, _ = predictor.encode(dataset.images[index : index + 1].numpy())
    low, high = TWEAK_RANGE
    steps = round((high - low) / TWEAK_STEP)
    deltas = np.linspace(low, high, steps + 1, dtype=np.float32).round(6) + 0.0  # + 0.0: no minus before zero
    dimensions = capsules.shape[-1]
    changed = np.repeat(capsules, dimensions * len(deltas), axis=0)
    for row in range(dimensions):
        changed[row * len(deltas) : (row + 1) * len(deltas), target, row] += deltas
    pictures = predictor.decode(changed, np.full(len(changed), target))
    beside = 0.085 * max(map(len, names), default=0)  # inches
    figure = Figure(figsize=(len(deltas) * 0.75 + beside, dimensions * 0.75), layout="constrained")
    axes = figure.subplots(dimensions, len(deltas))
    for row in range(dimensions):
        for column in range(len(deltas)):
            axis = axes[row, column]
            _show(axis, pictures[row * len(deltas) + column])
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(False)
        axes[row, 0].set_ylabel(
            f"{names[row]}  {row}" if names else str(row), rotation=0, labelpad=10, va="center", ha="right"
        )
    for column, delta in enumerate(deltas):
        axes[0, column].set_title(f"{delta:+.2f}", fontsize=8)
    figure.suptitle(
        f"each dimension of the capsule for {label}, changed by {deltas[0]:+.2f} … {deltas[-1]:+.2f}"
    )
    figure.savefig(path, dpi=110)


def draw_effects(dimensions: Dimensions, path: Path) -> None:
    """Draw what each dimension of each class does: for every measure a map of classes by dimensions.

    A field is empty where the images of a class do not agree.

    Args:
        dimensions: of one class at least.
    """
    maps = {"squared change, of squared light": [[d.moved for d in row] for row in dimensions.values()]}
    for measure, unit in UNITS.items():
        effects = [[d.effects.get(measure) for d in row] for row in dimensions.values()]
        maps[f"{NOUNS[measure]}, {unit}"] = [[e.change if e else np.nan for e in row] for row in effects]
    lines = -(-len(maps) // 2)
    figure = Figure(figsize=(15, 1 + lines * (0.7 + 0.2 * len(dimensions))), layout="constrained")
    for axis, (title, values) in zip(figure.subplots(lines, 2).flat, maps.items(), strict=True):
        changes = np.array(values)
        limit = np.nanmax(np.abs(changes), initial=np.finfo(float).tiny)
        axis.imshow(changes, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        axis.set_xticks(range(changes.shape[1]))
        axis.set_yticks(range(len(dimensions)), dimensions)
        axis.set_title(title, fontsize=10)
        for (row, column), change in np.ndenumerate(changes):
            if np.isfinite(change):
                colour = "white" if abs(change) > 0.65 * limit else "black"
                axis.text(column, row, f"{change:.3g}", ha="center", va="center", fontsize=7, color=colour)
    figure.suptitle(
        "change while a dimension goes from {:+g} to {:+g}, by class and dimension; empty where fewer than "
        "{:.0%} of the images agree".format(*TWEAK_RANGE, AGREEMENT)
    )
    figure.savefig(path, dpi=110)


def typical(predictor: Predictor, dataset: Dataset, label: str) -> tuple[int, int]:
    """The index of a clear picture of class `label`, and that class's index.

    Of the first hundred pictures of the class, the one with the longest capsule.
    """
    if label not in dataset.classes:
        raise DataError(f"class {label!r} is unknown, expected one of {list(dataset.classes)}")
    target = dataset.classes.index(label)
    candidates = np.flatnonzero(dataset.labels.numpy() == target)[:100]
    _, lengths = predictor.encode(dataset.images[candidates].numpy())
    return int(candidates[lengths[:, target].argmax()]), target


def _encode_all(
    predictor: Predictor, images: NDArray[np.uint8], batch_size: int = 250
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    parts = [predictor.encode(images[i : i + batch_size]) for i in range(0, len(images), batch_size)]
    return np.concatenate([capsules for capsules, _ in parts]), np.concatenate(
        [lengths for _, lengths in parts]
    )


def _spread(labels: NDArray[np.int64], candidates: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Up to `count` of `candidates`, spread over the classes, in the order of their labels."""
    order: NDArray[np.int64] = candidates[np.argsort(labels[candidates], kind="stable")]
    every = np.linspace(0, len(order) - 1, min(count, len(order))).astype(int)
    picked: NDArray[np.int64] = order[every]
    return picked


def _show(axis, picture: NDArray[np.floating]) -> None:  # type: ignore[no-untyped-def] # an Axes of matplotlib's untyped grid
    axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
