"""How well reconstruction error and margin give away images of no class, and images made to be mistaken.

After Frosst, Sabour and Hinton, "DARCCC: Detecting Adversaries by Reconstruction from Class Conditional
Capsules" (2018).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from service.manifest import Calibration, margins
from training import data
from training.attacks import ATTACKS, STEPS, open_to_attack
from training.data import DataError, Dataset, on_light_ground
from training.evaluate import Evaluation, evaluate, require_fit
from training.export import outlier_sets
from training.model import CapsNet
from training.predictor import TorchPredictor

Floats = NDArray[np.floating[Any]]

EPSILONS = (16, 32, 64)
"""Most grey levels, of 255, that an attack may move a pixel by."""
STYLES = ("-", "--", ":", "-.")
BATCH = 50
"""Images attacked at a time."""
FALSE_ALARMS = [0.0, *np.logspace(-3, 0, 19).round(4).tolist()]
"""Where the curves of a record are read off: shares of the test images that are flagged."""


def scores(evaluation: Evaluation) -> dict[str, Floats]:
    """How strange each image is by either measure, (M,): the larger, the stranger."""
    return {"error": evaluation.reconstruction_errors, "margin": -margins(evaluation.lengths)}


def roc(usual: Floats, strange: Floats) -> tuple[Floats, Floats]:
    """Shares of usual and of strange scores at or above each threshold, from none of them to all."""
    thresholds = np.unique(np.concatenate([usual, strange]))[::-1]
    above = [1 - np.searchsorted(np.sort(s), thresholds, side="left") / len(s) for s in (usual, strange)]
    return np.insert(above[0], 0, 0), np.insert(above[1], 0, 0)


def area(usual: Floats, strange: Floats) -> float:
    """Under the ROC curve: how often a strange score is above a usual one; equal ones count half."""
    false, true = roc(usual, strange)
    return float(np.trapezoid(true, false))


def outliers(dataset: Dataset, data_dir: Path | None = None) -> tuple[dict[str, Tensor], list[str]]:
    """Images of no class of `dataset`, (M, H, W[, 3]) by kind, and the kinds that this machine lacks."""
    kinds = {kind: images for kind, images, _ in outlier_sets(dataset)}
    if dataset.name == "fashion-mnist" or tuple(dataset.images.shape[1:]) != (28, 28):
        return kinds, []
    try:
        fashion = data.load("fashion-mnist", "test", data_dir, download=False)
    except DataError:
        return kinds, ["Fashion-MNIST"]
    images = fashion.images[: len(dataset)]  # light on dark
    return {**kinds, "Fashion-MNIST": 255 - images if on_light_ground(dataset.images) else images}, []


def measure(
    network: CapsNet,
    calibration: Calibration,
    dataset: Dataset,
    others: Mapping[str, Tensor],
    *,
    attacked: int = 500,
    epsilons: Iterable[int] = EPSILONS,
    steps: int = STEPS,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """What is given away of `others` and of attacks, beside false alarms on `dataset`, as plain values.

    Of the rightly classified images, `attacked` at even distances, or all if there are fewer, are attacked
    with the network's own gradients. Of an attack, only the images that are mistaken afterwards count as
    strange.

    Args:
        network: is opened to attack, and left so.
        others: images of no class, by kind.

    Raises:
        DataError: if the network does not take the images or recognises none, if they show several things, or
            if none of them is to be attacked, in no step, or by no grey level.
    """
    epsilons = tuple(epsilons)
    for name, number in (("attacked", attacked), ("steps", steps), *(("epsilon", most) for most in epsilons)):
        if number < 1:
            raise DataError(f"{name} is {number}, expected at least 1")
    predictor = TorchPredictor(network)
    require_fit(predictor, dataset)
    if dataset.labels.ndim != 1:
        raise DataError(f"{dataset.name}: images of several things, expected one class for each")
    usual = evaluate(predictor, dataset)
    record: dict[str, Any] = {
        "dataset": dataset.name,
        "images": len(dataset),
        "test_error": usual.error,
        "calibration": calibration.model_dump(),
        "false_alarms": _flagged(usual, calibration),
        "outliers": {},
        "attacks": [],
    }
    for kind, images in others.items():
        found = evaluate(predictor, replace(dataset, images=images, labels=torch.zeros(len(images)).long()))
        record["outliers"][kind] = {"images": len(images), **_detected(usual, found, calibration)}
        say(f"{kind}: {record['outliers'][kind]['flagged']}")
    right = data.take(dataset, torch.from_numpy(np.flatnonzero(~usual.wrong)))
    if not len(right):
        raise DataError(f"{dataset.name}: the network is right about no image, and none can be attacked")
    right = data.sample(right, min(attacked, len(right)))
    record |= {"attacked": len(right), "steps": steps}
    open_to_attack(network)
    for name, attack in ATTACKS.items():
        for epsilon in epsilons:
            made = [
                attack(network, images, labels, epsilon, steps)
                for images, labels in zip(right.images.split(BATCH), right.labels.split(BATCH), strict=True)
            ]
            after = evaluate(predictor, replace(right, images=torch.cat(made)))
            fooled = _those(after, after.wrong)
            unnoticed = calibration.usual(fooled.reconstruction_errors, fooled.lengths).sum()
            record["attacks"].append(
                {
                    "attack": name,
                    "epsilon": epsilon,
                    "success": _percent(after.wrong.mean()),
                    "unnoticed": _percent(unnoticed / len(right)),
                    **_detected(usual, fooled, calibration),
                }
            )
            done = record["attacks"][-1]
            say(f"{name}, {epsilon}: {done['success']:.1f} % mistaken, {done['unnoticed']:.1f} % unnoticed")
    return record


def _those(evaluation: Evaluation, which: NDArray[np.bool_]) -> Evaluation:
    return Evaluation(
        evaluation.labels[which],
        evaluation.predictions[which],
        evaluation.reconstruction_errors[which],
        evaluation.lengths[which],
    )


def _flagged(evaluation: Evaluation, calibration: Calibration) -> dict[str, float]:
    """Share, in per cent, that is beyond either calibrated bound, and beyond at least one of them."""
    errors, lengths = evaluation.reconstruction_errors, evaluation.lengths
    beyond = {
        "error": errors > calibration.threshold,
        "margin": margins(lengths) < calibration.margin,
        "either": ~calibration.usual(errors, lengths),
    }
    return {name: _percent(those.mean()) for name, those in beyond.items()}


def _detected(usual: Evaluation, strange: Evaluation, calibration: Calibration) -> dict[str, Any]:
    """Area under the curves, the curves themselves, and what is flagged; nothing of no images."""
    if not strange.images:
        return {"auc": None, "flagged": None, "curves": None}
    pairs = {name: (score, scores(strange)[name]) for name, score in scores(usual).items()}
    return {
        "auc": {name: round(area(*pair), 4) for name, pair in pairs.items()},
        "flagged": _flagged(strange, calibration),
        "curves": {name: _read_off(*roc(*pair)) for name, pair in pairs.items()},
    }


def _read_off(false: Floats, true: Floats) -> list[float]:
    """The largest share of strange images that is found at no more than each of `FALSE_ALARMS`."""
    at: Floats = true[np.searchsorted(false, FALSE_ALARMS, side="right") - 1]
    return [round(float(share), 3) for share in at]


def _percent(share: float) -> float:
    return round(100 * float(share), 2)


def draw(record: Mapping[str, Any], path: Path) -> None:
    """ROC curves by reconstruction error above those by margin; crosses where the calibrated rule stands."""
    groups = {
        "images of no class": record["outliers"],
        "attacks that succeed": {f"{a['attack']}, {a['epsilon']}": a for a in record["attacks"]},
    }
    widths = sorted({attack["epsilon"] for attack in record["attacks"]})
    figure = Figure(figsize=(11, 8), layout="constrained")
    grid = figure.subplots(2, 2)
    false = record["false_alarms"]["either"] / 100
    for column, (group, kinds) in enumerate(groups.items()):
        for row, score in enumerate(("error", "margin")):
            axes: Axes = grid[row, column]
            for number, (kind, found) in enumerate(kinds.items()):
                if not found["curves"]:
                    continue
                alike = len(widths) if column else 1  # curves of one colour: an attack's
                colour, style = f"C{number // alike}", STYLES[number % alike % len(STYLES)]
                curve, auc = found["curves"][score], found["auc"][score]
                axes.plot(FALSE_ALARMS, curve, style, color=colour, label=f"{kind} (AUC {auc:.3f})")
                axes.plot(false, found["flagged"]["either"] / 100, "x", color=colour)
            axes.set_xscale("symlog", linthresh=1e-3)
            axes.set(title=f"{group}, by {score}", xlim=(0, 1), ylim=(-0.02, 1.02))
            axes.set(xlabel="share of test images flagged", ylabel="share of these flagged")
            axes.grid(alpha=0.3)
            if axes.lines:  # perhaps no attack succeeded
                axes.legend(fontsize=8)
    figure.suptitle(
        f"{record['network']['name']}: {record['images']:,} test images, {record['attacked']} attacked; "
        "crosses: both calibrated bounds together",
        fontsize=10,
        parse_math=False,
    )
    figure.savefig(path, dpi=110)
