"""Pictures of what a network sees: reconstructions, and the continuous change of each capsule dimension."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from numpy.typing import NDArray

from service.manifest import Dimensions
from training.config import TWEAK_RANGE, TWEAK_STEP
from training.data import DataError, Dataset
from training.dimensions import AGREEMENT, NOUNS, sweep
from training.morphology import UNITS
from training.predictor import Predictor

mpl.use("Agg")  # files only: no window, no display needed

BATCH = 250
PAIRS = 2000
"""Images of two digits that those to draw are taken from; there are 50,000, and few are mistakes."""


def draw_reconstructions(predictor: Predictor, dataset: Dataset, path: Path, columns: int = 12) -> None:
    """Draw images above their reconstructions: some of every class, then mistakes, as in figure 3.

    Each column is titled (label, prediction), one above the other where a class has a long name.
    """
    images = dataset.images.numpy()
    labels = dataset.labels.numpy()
    capsules, lengths = _encode_all(predictor, images)
    predictions = lengths.argmax(axis=-1)
    right = _spread(labels, np.flatnonzero(predictions == labels), columns)
    wrong = np.flatnonzero(predictions != labels)[:columns]
    rows = [row for row in (right, wrong) if len(row)]
    between = ", " if max(map(len, dataset.classes)) <= 3 else "\n"
    titles = [_clipped(label, 0.9, size=9) for label in dataset.classes]  # the columns are an inch apart
    figure = Figure(figsize=(columns, 2.5 * len(rows)), layout="constrained")
    axes = figure.subplots(2 * len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, row in enumerate(rows):
        reconstructions = predictor.decode(capsules[row], predictions[row])
        for j, index in enumerate(row):
            _show(axes[2 * i, j], images[index] / 255)
            _show(axes[2 * i + 1, j], reconstructions[j])
            axes[2 * i, j].set_title(
                f"{titles[labels[index]]}{between}{titles[predictions[index]]}",
                fontsize=9,
                color="black" if labels[index] == predictions[index] else "firebrick",
                parse_math=False,
            )
    figure.suptitle("input above reconstruction; (label, prediction)", fontsize=10)
    figure.savefig(path, dpi=110)


def draw_pairs(predictor: Predictor, dataset: Dataset, path: Path, columns: int = 12) -> None:
    """Draw images of two digits above what is drawn from two of their capsules, each by itself: figure 5.

    A column shows the input; its true digits, one in red, the other in green; both reconstructions in the
    same colours; and each of them alone. L are the labels, R the classes that were drawn, in the order of
    their colours. Columns are, in three groups:

    * rightly recognised images, drawn from their labels;
    * mistakes, each drawn from its labels and again from the prediction, marked P;
    * the first of the images again, marked *, drawn from one of its labels and from the longest capsule of
      a class that is neither label nor prediction: little should come of it.

    Raises:
        DataError: if the images are not of two digits each.
    """
    if dataset.digits is None or dataset.digits.shape[1] != 2:
        raise DataError(f"{dataset.name}: its images are not made of two digits each")
    labels = dataset.labels[:PAIRS].numpy()
    capsules, lengths = _encode_all(predictor, dataset.images[:PAIRS].numpy())
    order = np.argsort(-lengths, axis=1, kind="stable")  # the longest first
    missed = (np.sort(order[:, :2], axis=1) != np.sort(labels, axis=1)).any(axis=1)
    right, wrong = np.flatnonzero(~missed), np.flatnonzero(missed)
    share = columns // 3
    chosen = [(i, labels[i], "") for i in right[: columns - 2 * share]]
    for i in wrong[: share // 2]:
        chosen += [(i, labels[i], ""), (i, _matched(order[i, :2], labels[i]), "P")]
    for i in [*right, *wrong][:share]:
        absent = [k for k in order[i, 2:] if k not in labels[i]]  # of three classes there may be none
        chosen += [(i, np.array([labels[i, 0], k]), "*") for k in absent[:1]]

    figure = Figure(figsize=(len(chosen), 6.2), layout="constrained")
    axes = figure.subplots(5, len(chosen), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for column, (index, targets, mark) in enumerate(chosen):
        capsule = capsules[index : index + 1]
        first, second = (predictor.decode(capsule, target[None])[0] for target in targets)
        tiles = (
            dataset.images[index].numpy() / 255,
            _two_colours(*(dataset.digits[index].numpy() / 255)),
            _two_colours(first, second),
            _two_colours(first, 0 * first),
            _two_colours(0 * second, second),
        )
        for row, tile in enumerate(tiles):
            _show(axes[row, column], tile)
        title = "\n".join(
            f"{mark}{letter}:({', '.join(dataset.classes[k] for k in pair)})"
            for letter, pair, mark in (("L", labels[index], ""), ("R", targets, mark))
        )
        colour = "firebrick" if missed[index] else "black"
        axes[0, column].set_title(title, fontsize=8, color=colour, parse_math=False)
    figure.suptitle(
        "input; its digits; both reconstructions; each of them (misread where the title is red)", fontsize=10
    )
    figure.savefig(path, dpi=110)


def _matched(predicted: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The two predicted classes so ordered that one which is a label keeps its label's place."""
    turned = predicted[0] == labels[1] or predicted[1] == labels[0]
    return predicted[::-1] if turned else predicted


def _two_colours(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.floating]:
    """(H, W) twice, in [0, 1] -> (H, W, 3): the one in red, the other in green, yellow where both are."""
    return np.stack([first, second, np.zeros_like(first)], axis=-1)


def draw_dimensions(
    predictor: Predictor, dataset: Dataset, label: str, path: Path, names: Sequence[str] = ()
) -> None:
    """Draw figure 4 for one image of class `label`: a row for each dimension, a column for each change.

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
    drawn = sweep(predictor, capsules[0], target, deltas)
    dimensions = len(drawn)
    beside = 0.085 * max(map(len, names), default=0)  # inches
    figure = Figure(figsize=(len(deltas) * 0.75 + beside, dimensions * 0.75), layout="constrained")
    axes = figure.subplots(dimensions, len(deltas))
    for row in range(dimensions):
        for column in range(len(deltas)):
            axis = axes[row, column]
            _show(axis, drawn[row, column])
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(False)
        axes[row, 0].set_ylabel(
            f"{names[row]}  {row}" if names else str(row),
            rotation=0,
            labelpad=10,
            va="center",
            ha="right",
            parse_math=False,
        )
    for column, delta in enumerate(deltas):
        axes[0, column].set_title(f"{delta:+.2f}", fontsize=8)
    shown = _clipped(label, figure.get_figwidth() - 5.8, size=12)  # beside the title's other words
    figure.suptitle(
        f"each dimension of the capsule for {shown}, changed by {deltas[0]:+.2f} … {deltas[-1]:+.2f}",
        parse_math=False,
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
    labels = [_clipped(label, 3, size=10) for label in dimensions]
    beside = max(_width(label, size=10) for label in labels)
    figure = Figure(
        figsize=(15 + 2 * beside, 1 + lines * (0.7 + 0.2 * len(dimensions))), layout="constrained"
    )
    for axis, (title, values) in zip(figure.subplots(lines, 2).flat, maps.items(), strict=True):
        changes = np.array(values)
        limit = np.nanmax(np.abs(changes), initial=np.finfo(float).tiny)
        axis.imshow(changes, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        axis.set_xticks(range(changes.shape[1]))
        axis.set_yticks(range(len(dimensions)), labels, parse_math=False)
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


LONGEST = 200
"""Bytes of a file's name that a label may take; file systems have room for 255 in all."""


def file_names(classes: Sequence[str]) -> dict[str, str]:
    """For each label a part of a file name, different from all others, whatever the labels are.

    Letters and digits stay, the rest becomes "-", and the end of a long one goes; labels that are then alike,
    or in another case alone, which some file systems do not tell apart, get their number behind a dot.
    """
    plain = []
    for label in classes:
        name = "".join(letter if letter.isalnum() else "-" for letter in label)
        plain.append(name.encode()[:LONGEST].decode(errors="ignore"))
    folded = [name.casefold() for name in plain]
    return {
        label: name if folded.count(name.casefold()) == 1 else f"{name}.{index}"
        for index, (label, name) in enumerate(zip(classes, plain, strict=True))
    }


def typical(predictor: Predictor, dataset: Dataset, label: str) -> tuple[int, int]:
    """The index of a clear image of class `label`, and that class's index.

    Of the first hundred images of the class, the one with the longest capsule.
    """
    if label not in dataset.classes:
        raise DataError(f"class {label!r} is unknown, expected one of {list(dataset.classes)}")
    target = dataset.classes.index(label)
    candidates = np.flatnonzero(dataset.labels.numpy() == target)[:100]
    _, lengths = predictor.encode(dataset.images[candidates].numpy())
    return int(candidates[lengths[:, target].argmax()]), target


def _encode_all(
    predictor: Predictor, images: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    parts = [predictor.encode(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
    return np.concatenate([capsules for capsules, _ in parts]), np.concatenate(
        [lengths for _, lengths in parts]
    )


def _spread(labels: NDArray[np.int64], candidates: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Up to `count` of `candidates`, spread over the classes, in the order of their labels."""
    order: NDArray[np.int64] = candidates[np.argsort(labels[candidates], kind="stable")]
    every = np.linspace(0, len(order) - 1, min(count, len(order))).astype(int)
    picked: NDArray[np.int64] = order[every]
    return picked


def _clipped(text: str, most: float, size: float) -> str:
    """A line of text that is at most `most` inches wide at `size` points; what is cut off is marked "…"."""
    line = " ".join(text.split())
    shown, end = line, len(line)
    while end > 0 and _width(shown, size) > most:
        end -= 1
        shown = f"{line[:end].rstrip()}…"
    return shown


def _width(text: str, size: float) -> float:
    """Of a line of text at `size` points, in inches."""
    return text_to_path.get_text_width_height_descent(text, FontProperties(size=size), ismath=False)[0] / 72


def _show(axis, image: NDArray[np.floating]) -> None:  # type: ignore[no-untyped-def] # an Axes of matplotlib's untyped grid
    axis.imshow(image, cmap="gray", vmin=0, vmax=1)
