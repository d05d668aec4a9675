from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL import Image

from service.manifest import Dimension, Effect
from training import visualize
from training.config import ModelConfig
from training.data import DataError, Dataset, Split
from training.model import CapsNet
from training.predictor import TorchPredictor
from training.visualize import draw_dimensions, draw_effects, draw_reconstructions, typical

Load = Callable[[Split], Dataset]


class Recorder(TorchPredictor):
    """Remembers what it was asked to draw."""

    def __init__(self, network: CapsNet) -> None:
        super().__init__(network)
        self.decoded: list[tuple[NDArray[np.float32], NDArray[np.int64]]] = []

    def decode(self, capsules: NDArray[np.float32], target: NDArray[np.int64]) -> NDArray[np.float32]:
        self.decoded.append((capsules, target))
        return super().decode(capsules, target)


@pytest.fixture
def predictor(model_config: ModelConfig) -> Recorder:
    torch.manual_seed(0)
    return Recorder(CapsNet(model_config).eval())


def test_dimensions(predictor: Recorder, load_split: Load, tmp_path: Path) -> None:
    """One dimension at a time of the class's capsule is changed by -0.25 … 0.25 in steps of 0.05."""
    dataset = load_split("test")
    draw_dimensions(predictor, dataset, "pole", tmp_path / "d.png")
    ((capsules, target),) = predictor.decoded
    assert set(target.tolist()) == {1}
    index, _ = typical(predictor, dataset, "pole")
    original = predictor.encode(dataset.images[index : index + 1].numpy())[0][0]
    change = (capsules - original).reshape(6, 11, 3, 6)  # dimension, step, class, dimension
    expected = np.zeros_like(change)
    for dimension in range(6):
        expected[dimension, :, 1, dimension] = np.linspace(-0.25, 0.25, 11)
    np.testing.assert_allclose(change, expected, atol=1e-6)
    with Image.open(tmp_path / "d.png") as picture:
        assert picture.width > picture.height


def test_names_beside_the_rows(predictor: Recorder, load_split: Load, tmp_path: Path) -> None:
    """Names widen the picture of a class's dimensions on the left, and leave its height."""
    dataset = load_split("test")
    draw_dimensions(predictor, dataset, "pole", tmp_path / "plain.png")
    names = ["width", "slant", "little effect", "height", "top part", "slant and stroke thickness"]
    draw_dimensions(predictor, dataset, "pole", tmp_path / "named.png", names)
    with Image.open(tmp_path / "plain.png") as plain, Image.open(tmp_path / "named.png") as named:
        assert named.height == plain.height
        assert named.width > plain.width + 100


def test_effects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each effect stands in its class's row and its dimension's column; what is none leaves a gap."""
    written: list[tuple[float, float, str]] = []
    monkeypatch.setattr(Axes, "text", lambda _, x, y, text, **__: written.append((x, y, text)))
    slant = Dimension(
        name="slant", moved=0.5, effects={"slant": Effect(change=-12.34, agreement=1)}, shares={"slant": 1}
    )
    none = Dimension(name="little effect", moved=0, effects={}, shares={})
    draw_effects({"bar": (none, slant), "pole": (none, none)}, tmp_path / "e.png")
    moved = [(0, 0, "0"), (1, 0, "0.5"), (0, 1, "0"), (1, 1, "0")]
    assert written == [*moved, (1, 0, "-12.3")]
    with Image.open(tmp_path / "e.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10, "something is drawn"


def test_reconstructions(
    predictor: Recorder, load_split: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right and wrong pictures are each drawn from the capsule of the class that was predicted."""
    dataset = load_split("test")
    draw_reconstructions(predictor, dataset, tmp_path / "r.png", columns=5)
    lengths = predictor.encode(dataset.images.numpy())[1]
    shown: list[NDArray[np.floating[Any]]] = []
    monkeypatch.setattr(visualize, "_show", lambda _, picture: shown.append(picture))
    predictor.decoded.clear()
    draw_reconstructions(predictor, dataset, tmp_path / "unseen.png", columns=5)
    inputs, drawn = np.stack(shown[::2]), np.stack(shown[1::2])
    known = {image.tobytes() for image in dataset.images.numpy() / 255}
    assert all(picture.tobytes() in known for picture in inputs)
    again = [TorchPredictor.decode(predictor, *call) for call in predictor.decoded]
    np.testing.assert_array_equal(drawn, np.concatenate(again))
    for capsules, target in predictor.decoded:
        assert np.linalg.norm(capsules, axis=-1).argmax(axis=-1).tolist() == target.tolist()
    assert 0 < len(predictor.decoded) <= 2
    assert len(lengths) == 66
    with Image.open(tmp_path / "r.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10, "something is drawn"


def test_unknown_class(predictor: Recorder, load_split: Load, tmp_path: Path) -> None:
    """A class that the network does not know is answered with those it does."""
    with pytest.raises(DataError, match="class 'cube' is unknown, expected one of"):
        draw_dimensions(predictor, load_split("test"), "cube", tmp_path / "d.png")
