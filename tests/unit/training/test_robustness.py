"""What a change does to an image, by hand, and that a network's error is measured under each."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from training import robustness
from training.config import ModelConfig
from training.data import DataError, Dataset
from training.networks import build
from training.predictor import Predictor, TorchPredictor
from training.robustness import CHANGES, Change
from training.trained import Trained

TRAINED = {"architecture": "capsnet", "epochs": 3, "finished": True}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def dots(count: int = 8) -> Tensor:
    """One pixel of 200, three to the right of the middle of 9x9."""
    images = torch.zeros(count, 9, 9, dtype=torch.uint8)
    images[:, 4, 7] = 200
    return images


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("shape", [(5, 28, 28), (5, 17, 20, 3)])
def test_the_first_strength_changes_nothing(name: str, shape: tuple[int, ...]) -> None:
    """Turned by 0 degrees, moved by 0 pixels, with all of its contrast and no noise an image stays."""
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator())
    change = CHANGES[name]
    assert torch.equal(change.apply(images, change.strengths[0], generator()), images)
    changed = change.apply(images, change.strengths[-1], generator())
    assert (changed.shape, changed.dtype) == (images.shape, torch.uint8)
    assert not torch.equal(changed, images)
    assert torch.equal(changed, change.apply(images, change.strengths[-1], generator())), "by its seed"


def test_a_quarter_turn() -> None:
    """The dot on the right is below or above, one as often as the other."""
    places = [
        tuple(p) for p in CHANGES["rotation"].apply(dots(100), 90, generator()).nonzero()[:, 1:].tolist()
    ]
    assert set(places) == {(7, 4), (1, 4)}
    assert 30 < places.count((7, 4)) < 70


def test_moved_by_two() -> None:
    """The dot moves by two pixels along one axis, and out of the frame when it goes right."""
    moved = CHANGES["translation"].apply(dots(100), 2, generator())
    assert {tuple(p) for p in moved.nonzero()[:, 1:].tolist()} == {(4, 5), (2, 7), (6, 7)}
    assert 10 < (moved.flatten(1).amax(dim=1) == 0).sum() < 40


@pytest.mark.parametrize("name", ["rotation", "translation"])
def test_a_light_ground_stays_light(name: str) -> None:
    """What a turn or a move brings into images of dark ink is light; they change as their negatives do."""
    change = CHANGES[name]
    moved = change.apply(255 - dots(), change.strengths[3], generator())
    assert moved.min() >= 55, "the ink's shade"
    assert torch.equal(255 - moved, change.apply(dots(), change.strengths[3], generator()))


def test_noise_of_a_standard_deviation() -> None:
    """On middle grey, noise of 20 grey levels has that deviation; twice the strength is twice the noise."""
    images = torch.full((4, 60, 60), 128, dtype=torch.uint8)
    weak, strong = (
        CHANGES["noise"].apply(images, strength, generator()).float() - 128 for strength in (10.0, 20.0)
    )
    assert float(strong.std()) == pytest.approx(20, rel=0.02)
    assert float(strong.mean()) == pytest.approx(0, abs=0.5)
    assert (strong - 2 * weak).abs().max() <= 2, "but for rounding"


def test_a_tenth_of_the_contrast() -> None:
    """Differences from an image's own mean shrink to a tenth; the mean stays."""
    images = torch.tensor([[[0, 0], [0, 200]], [[100, 100], [100, 100]]], dtype=torch.uint8)
    pale = CHANGES["contrast"].apply(images, 0.1, generator())
    assert pale.tolist() == [[[45, 45], [45, 65]], [[100, 100], [100, 100]]]


class Corner:
    """Takes images with a bright first pixel for class 1; has no decoder."""

    classes = ("dark", "bright")
    image_shape = (4, 4)
    draws = False

    def encode(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        bright = (images[:, 0, 0] > 127).astype(np.float32)
        lengths = np.stack([1 - bright, bright], axis=1)
        return lengths[..., None], lengths

    def decode(self, capsules: NDArray[np.float32], target: NDArray[np.int64]) -> NDArray[np.float32]:
        raise AssertionError("there is nothing to decode")


def bright_and_dark() -> Dataset:
    images = torch.zeros(4, 4, 4, dtype=torch.uint8)
    images[1:, 0, 0] = 200
    return Dataset("corners", Corner.classes, images, torch.tensor([0, 1, 1, 0]), {})


def test_errors_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four images one is wrong as it is, and two once the light is out; in each change's panel stands each
    network's curve of it, to the top."""
    dim = Change("grey levels", (0, 50, 100), lambda images, s, _: (images.float() - s).clamp(0, 255).byte())
    changes = {"shade": dim, "again": replace(dim, strengths=(0, 90))}
    networks = [Trained(name, Corner(), TRAINED, Path("runs", name)) for name in ("one", r"$\frac$")]
    found = robustness.measure(networks, bright_and_dark(), changes=changes, say=lambda _: None)
    assert [network["name"] for network in found["networks"]] == ["one", r"$\frac$"]
    for network in found["networks"]:
        assert network["errors"] == {"shade": [25.0, 25.0, 50.0], "again": [25.0, 50.0]}
        assert network["training"] == TRAINED
    assert found["strengths"]["shade"] == [0, 50, 100]
    assert found["images"] == 4
    assert json.loads(json.dumps(found)) == found
    curves: list[tuple[Axes, Any, Any, str]] = []
    plot = Axes.plot

    def note(axes: Axes, x: Any, y: Any, **options: Any) -> None:
        curves.append((axes, x, y, options["label"]))
        plot(axes, x, y, **options)

    monkeypatch.setattr(Axes, "plot", note)
    robustness.draw(found, tmp_path / "r.png")  # the second's name as it is, not as TeX
    assert [(axes.get_title(), x, y, label) for axes, x, y, label in curves] == [
        (change, found["strengths"][change], network["errors"][change], robustness.label(network))
        for change in ("shade", "again")
        for network in found["networks"]
    ]
    assert all(axes.get_ylim()[0] == 0 and axes.get_ylim()[1] >= 50 for axes, *_ in curves)
    with Image.open(tmp_path / "r.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10, "something is drawn"


def test_runs_of_the_same_name_are_told_apart() -> None:
    """Networks whose names are alike are called by their paths as given, in what is said and recorded."""
    paths = [Path("A/run"), Path("B/run"), Path("A/other")]
    networks = [Trained(path.name, Corner(), TRAINED, path) for path in paths]
    said: list[str] = []
    dim = Change("grey levels", (0, 100), lambda images, s, _: (images.float() - s).clamp(0, 255).byte())
    found = robustness.measure(networks, bright_and_dark(), changes={"shade": dim}, say=said.append)
    names = ["A/run", "B/run", "other"]
    assert [network["name"] for network in found["networks"]] == names
    assert said == [f"{name}: shade 100: error 50.00 %" for name in names]


def test_the_baseline_is_measured_too(model_config: ModelConfig) -> None:
    """A CNN without capsules stands beside the others, under all four changes, at the same seed alike."""
    shape = {**model_config.as_dict(), "conv_channels": 4}
    predictors: list[Predictor] = [
        TorchPredictor(build(ModelConfig.from_dict({**shape, "architecture": name})).eval())
        for name in ("baseline-cnn", "efficient-capsnet", "capsnet")
    ]
    images = torch.randint(0, 256, (6, 13, 12), dtype=torch.uint8)
    dataset = Dataset("shapes", model_config.classes, images, torch.arange(6) % 3, {})
    networks = [Trained(str(i), predictor, TRAINED, Path(str(i))) for i, predictor in enumerate(predictors)]
    found, again = (robustness.measure(networks, dataset, say=lambda _: None) for _ in range(2))
    assert found == again
    for network in found["networks"]:
        assert [len(curve) for curve in network["errors"].values()] == [9, 9, 7, 9]


def test_the_seed_decides_what_is_drawn() -> None:
    """One seed gives the same images each time, and another one others."""
    drawn: list[float] = []

    def note(images: Tensor, _: float, generator: torch.Generator) -> Tensor:
        drawn.append(float(torch.rand(1, generator=generator)))
        return images

    for seed in (1, 1, 2):
        networks = [Trained("one", Corner(), TRAINED, Path("one"))]
        changes = {"noise": Change("grey levels", (0, 50), note)}
        robustness.measure(networks, bright_and_dark(), seed=seed, changes=changes, say=lambda _: None)
    assert drawn[0] == drawn[1] != drawn[2]


def test_another_networks_images() -> None:
    """A network that takes other images is refused before any is measured."""
    dataset = bright_and_dark()
    large = Dataset("large", dataset.classes, torch.zeros(1, 5, 5, dtype=torch.uint8), torch.zeros(1), {})
    with pytest.raises(DataError, match="the network takes"):
        robustness.measure([Trained("one", Corner(), TRAINED, Path("one"))], large)


def test_labels() -> None:
    """A curve says which network it is of, and whether that was trained to the end."""
    assert robustness.label({"name": "mnist/2", "training": TRAINED}) == "mnist/2 (capsnet, 3 epochs)"
    begun = {"name": "a-run", "training": TRAINED | {"finished": False}}
    assert robustness.label(begun) == "a-run (capsnet, 3 epochs, not finished)"
