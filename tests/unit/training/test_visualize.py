import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image

from service.manifest import Dimension, Effect
from training import visualize
from training.compose import as_seen
from training.config import ModelConfig
from training.data import DataError, Dataset, Split
from training.model import CapsNet
from training.predictor import TorchPredictor
from training.visualize import (
    draw_dimensions,
    draw_effects,
    draw_pairs,
    draw_reconstructions,
    file_names,
    typical,
)

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
    """Right and wrong images are each drawn from the capsule of the class that was predicted."""
    dataset = load_split("test")
    draw_reconstructions(predictor, dataset, tmp_path / "r.png", columns=5)
    lengths = predictor.encode(dataset.images.numpy())[1]
    shown: list[NDArray[np.floating[Any]]] = []
    monkeypatch.setattr(visualize, "_show", lambda _, tile: shown.append(tile))
    predictor.decoded.clear()
    draw_reconstructions(predictor, dataset, tmp_path / "unseen.png", columns=5)
    inputs, drawn = np.stack(shown[::2]), np.stack(shown[1::2])
    known = {image.tobytes() for image in dataset.images.numpy() / 255}
    assert all(image.tobytes() in known for image in inputs)
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


class Known:
    """Finds in the i-th image what it is told to, and draws class k in the shade of k tenths."""

    classes: tuple[str, ...] = tuple("abcd")
    image_shape = (4, 4)
    draws = True

    def __init__(self, longest_first: list[list[int]]) -> None:
        self.lengths = np.zeros((len(longest_first), 4), np.float32)
        for row, order in zip(self.lengths, longest_first, strict=True):
            row[order] = (0.9, 0.8, 0.2, 0.1)

    def encode(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        lengths = self.lengths[images[:, 0, 0]]
        return lengths[..., None], lengths

    def decode(self, capsules: NDArray[np.float32], target: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.broadcast_to(target[:, None, None] / np.float32(10), (len(target), 4, 4))


def of_two_digits() -> Dataset:
    """Three images, numbered in a corner; their digits lie in the first row and in the first column."""
    digits = torch.zeros(3, 2, 4, 4, dtype=torch.uint8)
    digits[:, 0, 1, 1:] = 255
    digits[:, 1, 1:, 1] = 255
    images = digits.amax(dim=1)
    images[:, 0, 0] = torch.arange(3)
    labels = torch.tensor([[0, 1], [2, 1], [3, 0]])
    return Dataset("multimnist", Known.classes, images, labels, {}, digits=digits)


def test_pairs_as_in_figure_5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right images, a mistake from its labels and from the prediction, and classes that are not there."""
    shown: list[tuple[Any, NDArray[np.floating[Any]]]] = []
    monkeypatch.setattr(visualize, "_show", lambda axis, tile: shown.append((axis, tile)))
    dataset = of_two_digits()
    draw_pairs(Known([[1, 0, 2, 3], [1, 3, 2, 0], [3, 0, 2, 1]]), dataset, tmp_path / "p.png", columns=6)
    columns = [shown[i : i + 5] for i in range(0, len(shown), 5)]
    assert [column[0][0].get_title() for column in columns] == [
        "L:(a, b)\nR:(a, b)",
        "L:(d, a)\nR:(d, a)",
        "L:(c, b)\nR:(c, b)",
        "L:(c, b)\nPR:(d, b)",  # b was found: it stays in its label's colour
        "L:(a, b)\n*R:(a, c)",
        "L:(d, a)\n*R:(d, c)",
    ]
    assert [column[0][0].title.get_color() for column in columns].count("firebrick") == 2
    for column, index, drawn in zip(
        columns, (0, 2, 1, 1, 0, 2), ((0, 1), (3, 0), (2, 1), (3, 1), (0, 2), (3, 2)), strict=True
    ):
        image, true, both, first, second = (tile for _, tile in column)
        np.testing.assert_array_equal(image, dataset.images[index].numpy() / 255)
        assert true[1, 2].tolist() == [1, 0, 0], "the first digit in red"
        assert true[2, 1].tolist() == [0, 1, 0], "the second in green"
        assert true[1, 1].tolist() == [1, 1, 0], "yellow where they overlap"
        np.testing.assert_allclose(both[0, 0], [drawn[0] / 10, drawn[1] / 10, 0])
        np.testing.assert_allclose(first[0, 0], [drawn[0] / 10, 0, 0])
        np.testing.assert_allclose(second[0, 0], [0, drawn[1] / 10, 0])


def test_no_class_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every class is label or prediction, nothing is drawn of one that is not there."""
    titles: list[Any] = []
    monkeypatch.setattr(visualize, "_show", lambda axis, _: titles.append(axis))
    three = Known([[1, 3, 2, 0]])
    three.lengths = three.lengths[:, 1:]  # b, c, d
    three.classes = ("b", "c", "d")
    dataset = of_two_digits()
    one = replace(
        dataset, images=0 * dataset.images[:1], labels=torch.tensor([[1, 0]]), classes=three.classes
    )
    draw_pairs(three, one, tmp_path / "p.png")
    assert [axis.get_title() for axis in titles[::5]] == ["L:(c, b)\nR:(c, b)", "L:(c, b)\nPR:(d, b)"]


def test_each_reconstruction_is_of_one_capsule(model_config: ModelConfig, tmp_path: Path) -> None:
    """A network that knows 36x36 images is asked to draw one capsule at a time, and a picture comes out."""
    torch.manual_seed(0)
    network = Recorder(CapsNet(replace(model_config, height=36, width=36)).eval())
    images = torch.zeros(30, 28, 28, dtype=torch.uint8)
    images[:, 4:24, 4:24] = torch.randint(0, 256, (30, 20, 20), dtype=torch.uint8)
    digits = Dataset("multimnist", model_config.classes, images, torch.arange(30) % 3, {}, layout="pairs")
    draw_pairs(network, as_seen(digits), tmp_path / "p.png", columns=9)
    assert all(capsules.shape == (1, 3, 6) and target.shape == (1,) for capsules, target in network.decoded)
    with Image.open(tmp_path / "p.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10, "something is drawn"


def test_pairs_of_images_of_one(predictor: Recorder, load_split: Load, tmp_path: Path) -> None:
    """A data set of single things has no pairs to draw."""
    with pytest.raises(DataError, match="shapes: its images are not made of two digits each"):
        draw_pairs(predictor, load_split("test"), tmp_path / "p.png")


def test_dollars_are_no_mathematics(predictor: Recorder, load_split: Load, tmp_path: Path) -> None:
    """Names of classes and dimensions are drawn as they are, also where TeX would fail on them."""
    classes = (r"$\frac$", "$_$", "$")
    dataset = replace(load_split("test"), classes=classes)
    draw_reconstructions(predictor, dataset, tmp_path / "r.png", columns=5)
    draw_dimensions(predictor, dataset, classes[0], tmp_path / "d.png", [classes[0]] * 6)
    none = Dimension(name=classes[0], moved=0, effects={}, shares={})
    draw_effects(dict.fromkeys(classes, (none,)), tmp_path / "e.png")
    pairs = replace(of_two_digits(), classes=(*classes, "d"))
    draw_pairs(Known([[1, 0, 2, 3], [1, 3, 2, 0], [3, 0, 2, 1]]), pairs, tmp_path / "p.png", columns=6)
    assert len(list(tmp_path.iterdir())) == 4


def test_file_names() -> None:
    """Labels that differ by punctuation or case alone have files of their own; plain ones keep their name."""
    assert file_names(("5", "T-shirt/top", "T-shirt top", "été", "a", "A", "T-shirt/top.1")) == {
        "5": "5",
        "T-shirt/top": "T-shirt-top.1",
        "T-shirt top": "T-shirt-top.2",
        "été": "été",
        "a": "a.4",
        "A": "A.5",
        "T-shirt/top.1": "T-shirt-top-1",
    }


def test_file_names_of_long_labels(tmp_path: Path) -> None:
    """The longest names that folders can have become names of files, each its own."""
    labels = ("é" * 127, "é" * 126 + "e", "e")
    names = file_names(labels)
    for name in names.values():
        (tmp_path / f"dimensions-{name}.png").touch()
    assert len(list(tmp_path.iterdir())) == 3
    assert names["e"] == "e"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures that would have been written."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    return figures


def require_apart(figure: Figure, texts: Iterable[Text]) -> None:
    """Assert that no text lies over another, or reaches beyond the figure's sides."""
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    for first, second in combinations(boxes, 2):
        assert not first.overlaps(second)
    assert boxes
    assert min(box.x0 for box in boxes) >= 0
    assert max(box.x1 for box in boxes) <= figure.bbox.x1


@pytest.mark.parametrize(
    "classes",
    [("cat", "dog", "owl"), ("Ankle boot", "T-shirt/top", "squäre ☃"), ("W" * 12, "W" * 30, "a\nb")],
    ids=["short", "plain", "long"],
)
def test_titles_are_apart(
    predictor: Recorder, load_split: Load, tmp_path: Path, drawn: list[Figure], classes: tuple[str, ...]
) -> None:
    """No title lies over another, however long the classes' names are; what is cut off is marked."""
    dataset = replace(load_split("test"), classes=classes)
    draw_reconstructions(predictor, dataset, tmp_path / "r.png", columns=4)
    drawn[0].draw_without_rendering()
    titles = [axis.title for axis in drawn[0].axes]
    require_apart(drawn[0], titles)
    words = {word for title in titles if title.get_text() for word in re.split(r", |\n", title.get_text())}
    assert all(word in classes or word.endswith("…") or word == "a b" for word in words)
    assert any(word.endswith("…") for word in words) == ("W" * 30 in classes)


def test_a_long_name_above_a_sweep(
    predictor: Recorder, load_split: Load, tmp_path: Path, drawn: list[Figure]
) -> None:
    """The title of a class's dimensions keeps within the picture."""
    dataset = replace(load_split("test"), classes=("W" * 30, "pole", "dot"))
    draw_dimensions(predictor, dataset, "W" * 30, tmp_path / "d.png")
    title = drawn[0].get_suptitle()
    assert title.startswith("each dimension of the capsule for WWW")
    assert title.endswith("W…, changed by -0.25 … +0.25")
    require_apart(drawn[0], drawn[0].texts)


def test_long_names_leave_effects_their_room(tmp_path: Path, drawn: list[Figure]) -> None:
    """Figures in a map of effects do not lie over one another, however long the classes' names are."""
    slant = Dimension(
        name="slant", moved=0.5, effects={"slant": Effect(change=-12.34, agreement=1)}, shares={"slant": 1}
    )
    draw_effects({"W" * 30: (slant,) * 16, "cat": (slant,) * 16}, tmp_path / "e.png")
    drawn[0].draw_without_rendering()
    for axis in drawn[0].axes[:3]:
        require_apart(drawn[0], [*axis.texts, *axis.get_yticklabels()])
