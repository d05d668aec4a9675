"""How a network's test error grows as the images are turned, moved, made noisy and made pale."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from training.affine import rotation, warp
from training.data import Dataset, on_light_ground
from training.evaluate import evaluate, require_fit
from training.trained import Trained

Apply = Callable[[Tensor, float, torch.Generator], Tensor]


@dataclass(frozen=True)
class Change:
    """One way to spoil images (B, H, W[, 3]) uint8, and how strongly it is tried."""

    unit: str
    strengths: tuple[float, ...]
    """The first changes nothing."""
    apply: Apply
    """Draws of the generator do not depend on the strength: a stronger change is the same one, larger."""


def _turn(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    degrees = strength * _signs(len(images), generator)
    return _warp(images, rotation(degrees), torch.zeros(len(images), 2))


def _move(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    along = torch.eye(2)[torch.randint(2, (len(images),), generator=generator)]  # right or down
    shift = strength * _signs(len(images), generator)[:, None] * along
    return _warp(images, torch.eye(2).repeat(len(images), 1, 1), shift)


def _warp(images: Tensor, linear: Tensor, shift: Tensor) -> Tensor:
    if on_light_ground(images):  # what a warp brings in is dark
        return 255 - warp(255 - images, linear, shift)
    return warp(images, linear, shift)


def _disturb(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    return _bytes(images + strength * torch.randn(images.shape, generator=generator))


def _pale(images: Tensor, strength: float, _: torch.Generator) -> Tensor:
    """Each pixel's difference from its image's mean is multiplied by `strength`."""
    x = images.float()
    mean = x.flatten(1).mean(dim=1).reshape(-1, *[1] * (x.ndim - 1))
    return _bytes(mean + strength * (x - mean))


def _signs(count: int, generator: torch.Generator) -> Tensor:
    """(count,), each 1 or -1."""
    return torch.randint(2, (count,), generator=generator) * 2.0 - 1


def _bytes(x: Tensor) -> Tensor:
    return x.round().clamp(0, 255).to(torch.uint8)


CHANGES = {
    "rotation": Change("degrees, either way", (0, 10, 20, 30, 40, 50, 60, 75, 90), _turn),
    "translation": Change("pixels, along one axis", (0, 1, 2, 3, 4, 5, 6, 7, 8), _move),
    "noise": Change("standard deviation, of 255 grey levels", (0, 20, 40, 60, 80, 100, 120), _disturb),
    "contrast": Change("share that is left", (1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2), _pale),
}


def measure(
    networks: Sequence[Trained],
    dataset: Dataset,
    *,
    seed: int = 0,
    changes: dict[str, Change] = CHANGES,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The test error of each network, in per cent, under each change at each strength, as plain values.

    All networks see the same images, which `seed` decides. Those whose names are alike are called by their
    paths.

    Raises:
        DataError: if a network does not take the data set's images.
    """
    for network in networks:
        require_fit(network.predictor, dataset)
    names = _names(networks)
    plain = [evaluate(network.predictor, dataset).error for network in networks]
    errors: list[dict[str, list[float]]] = [
        {name: [error] for name in changes}
        for error in plain  # what the first strength comes to
    ]
    for name, change in changes.items():
        for strength in change.strengths[1:]:
            changed = change.apply(dataset.images, strength, torch.Generator().manual_seed(seed))
            for called, network, found in zip(names, networks, errors, strict=True):
                error = evaluate(network.predictor, replace(dataset, images=changed)).error
                found[name].append(error)
                say(f"{called}: {name} {strength:g}: error {error:.2f} %")
    return {
        "dataset": dataset.name,
        "images": len(dataset),
        "seed": seed,
        "strengths": {name: list(change.strengths) for name, change in changes.items()},
        "units": {name: change.unit for name, change in changes.items()},
        "networks": [
            {"name": called, "training": network.training, "errors": found}
            for called, network, found in zip(names, networks, errors, strict=True)
        ],
    }


def _names(networks: Sequence[Trained]) -> list[str]:
    """The networks' names, or the paths as given of those whose names are alike."""
    often = Counter(network.name for network in networks)
    return [str(network.path) if often[network.name] > 1 else network.name for network in networks]


def draw(measured: dict[str, Any], path: Path) -> None:
    """A panel for each change, a curve for each network."""
    names = list(measured["strengths"])
    figure = Figure(figsize=(10, 7), layout="constrained")
    grid = figure.subplots(2, -(-len(names) // 2), squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        strengths = measured["strengths"][name]
        for network in measured["networks"]:
            axes.plot(strengths, network["errors"][name], marker=".", label=label(network))
        axes.set(title=name, xlabel=measured["units"][name], ylabel="test error, %", ylim=(0, None))
        axes.set_xlim(strengths[0], strengths[-1])  # the image as it is on the left
        axes.grid(alpha=0.3)
    legend = figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center")
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.suptitle(f"{measured['images']:,} test images of {measured['dataset']}", fontsize=10)
    figure.savefig(path, dpi=110)


def label(network: dict[str, Any]) -> str:
    """A network's name and how long it was trained, for a legend."""
    training = network["training"]
    unfinished = "" if training["finished"] else ", not finished"
    return f"{network['name']} ({training['architecture']}, {training['epochs']} epochs{unfinished})"
