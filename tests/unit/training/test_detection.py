"""ROC curves by hand, what is flagged, and the whole measurement on a small network."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor

from service.manifest import Calibration
from training import checkpoint as checkpoints
from training import data, detection
from training import export as export_module
from training.cli import main
from training.config import ModelConfig, TrainConfig
from training.data import DataError, Dataset, Split, sample
from training.detection import FALSE_ALARMS, area, roc, scores
from training.evaluate import Evaluation, evaluate
from training.export import Name, calibrate, calibration_set, export
from training.model import CapsNet
from training.predictor import TorchPredictor
from training.train import train
from training.trained import read_exported

Load = Callable[[Split], Dataset]


def test_separable_scores() -> None:
    """Scores that a threshold tells apart have an area of 1, the other way round of 0."""
    low, high = np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0])
    assert area(low, high) == 1
    assert area(high, low) == 0
    false, true = roc(low, high)
    assert false.tolist() == pytest.approx([0, 0, 0, 1 / 3, 2 / 3, 1])
    assert true.tolist() == pytest.approx([0, 0.5, 1, 1, 1, 1])


def test_equal_scores() -> None:
    """Scores that say nothing have an area of one half, all equal or all in both."""
    assert area(np.full(3, 7.0), np.full(5, 7.0)) == 0.5
    both = np.arange(10.0)
    assert area(both, both) == pytest.approx(0.5)


def test_area_counts_pairs() -> None:
    """The area is the share of pairs in the right order, equal ones by half: here 5.5 of 6."""
    assert area(np.array([1.0, 2.0, 3.0]), np.array([3.0, 9.0])) == pytest.approx(5.5 / 6)


def test_doubtful_images_are_the_stranger() -> None:
    """Of two, the one that is drawn worse by error, and the one with the smaller lead by margin."""
    lengths = np.array([[0.9, 0.1], [0.5, 0.4]], np.float32)
    found = scores(Evaluation(np.zeros(2, int), np.zeros(2, int), np.array([3, 8], np.float32), lengths))
    for strangeness in found.values():
        assert strangeness[0] < strangeness[1]


def test_curves_are_read_off_without_promising_more() -> None:
    """Between two points of a curve the lower one counts."""
    usual, strange = np.arange(4.0), np.array([2.5, 3.5])
    read = dict(zip(FALSE_ALARMS, detection._read_off(*roc(usual, strange)), strict=True))
    assert read[0.0] == 0.5, "3.5 is above all usual ones"
    assert read[0.1] == 0.5
    assert read[1.0] == 1


def test_sample_is_spread_evenly(load_split: Load) -> None:
    """Every third image of 66 makes 22, and more than there are cannot be had."""
    dataset = load_split("test")
    assert torch.equal(sample(dataset, 22).images, dataset.images[::3])
    assert sample(dataset, None) is dataset
    for count in (0, 67):
        with pytest.raises(DataError, match="expected 1 to 66"):
            sample(dataset, count)


@pytest.fixture(scope="module")
def run(
    model_config: ModelConfig,
    train_config: TrainConfig,
    load_split: Load,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run's folder, and beside it the model that it was exported to."""
    folder = tmp_path_factory.mktemp("made") / "a-run"
    state = train(
        load_split("train"), model_config, replace(train_config, epochs=12), folder,
        load_test=lambda: load_split("test"),
    )  # fmt: skip
    export(state, Name(folder.parent / "models", "shapes", "1"), load_split)
    return folder


@pytest.fixture
def network(run: Path) -> CapsNet:
    return read_exported(run.parent / "models/shapes/1")


def test_measured(network: CapsNet, load_split: Load, tmp_path: Path) -> None:
    """A tenth is flagged as calibrated; noise is told apart; attacks succeed more the wider they go."""
    dataset = load_split("test")
    usual = evaluate(TorchPredictor(network), dataset)
    calibration = Calibration(
        threshold=float(np.quantile(usual.reconstruction_errors, 0.9)), margin=0.05, quantile=0.9, images=66,
        source="training",
    )  # fmt: skip
    noise = torch.randint(0, 256, (20, 13, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = detection.measure(
        network, calibration, dataset, {"noise": noise}, attacked=30, epsilons=(1, 8, 100), say=lambda _: None
    )
    alarms = found["false_alarms"]
    assert alarms["error"] == pytest.approx(100 * 7 / 66, abs=0.01), "a tenth of 66, and 65 steps between"
    assert max(alarms["error"], alarms["margin"]) <= alarms["either"] <= alarms["error"] + alarms["margin"]
    assert found["outliers"]["noise"]["images"] == 20
    assert found["outliers"]["noise"]["auc"]["error"] > 0.9
    assert found["attacked"] == 30
    assert [(a["attack"], a["epsilon"]) for a in found["attacks"]] == [
        (name, epsilon) for name in ("FGSM", "BIM", "R-BIM") for epsilon in (1, 8, 100)
    ]
    for least, small, large in (found["attacks"][i : i + 3] for i in (0, 3, 6)):
        assert least["success"] <= small["success"] < large["success"]
        assert large["unnoticed"] == pytest.approx(
            large["success"] * (1 - large["flagged"]["either"] / 100), abs=0.02
        )
    record = {"network": {"name": r"$\frac$", "training": {}}, "missing": [], **found}
    assert json.loads(json.dumps(record)) == record
    record["attacks"][0]["curves"] = None  # as if it succeeded with no image
    detection.draw(record, tmp_path / "d.png")
    with Image.open(tmp_path / "d.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10, "something is drawn"
    for attack in record["attacks"]:
        attack["curves"] = None
    detection.draw(record, tmp_path / "none.png")  # an empty panel, and no warning


def test_each_curve_is_in_its_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves by error stand in the panels of the error, by margin in the others, each with its own area;
    in both a cross tells what share is beyond either bound."""
    drawn: list[tuple[Axes, Any, Any, str]] = []

    def plot(axes: Axes, x: Any, y: Any, style: str, *, color: str, label: str = "") -> None:
        drawn.append((axes, x, y, label or style))

    monkeypatch.setattr(Axes, "plot", plot)

    def found(start: float, auc: float) -> dict[str, Any]:
        curves = {name: [by + start] * len(FALSE_ALARMS) for name, by in (("error", 0.1), ("margin", 0.2))}
        areas = {"error": auc, "margin": auc / 2}
        flagged = {"error": 100 * start, "margin": 0.0, "either": 100 * start + 5}
        return {"curves": curves, "auc": areas, "flagged": flagged}

    record = {
        "network": {"name": "shapes/1"},
        "images": 66,
        "attacked": 30,
        "false_alarms": {"error": 4.0, "margin": 3.0, "either": 6.0},
        "outliers": {"noise": found(0.5, 0.8)},
        "attacks": [{"attack": "BIM", "epsilon": 8, **found(0.25, 0.4)}],
    }
    detection.draw(record, tmp_path / "d.png")
    assert [(axes.get_title(), x, y, label) for axes, x, y, label in drawn] == [
        (title, x, pytest.approx(y), label)
        for title, share, cross, curve in (
            ("images of no class, by error", 0.6, 0.55, "noise (AUC 0.800)"),
            ("images of no class, by margin", 0.7, 0.55, "noise (AUC 0.400)"),
            ("attacks that succeed, by error", 0.35, 0.3, "BIM, 8 (AUC 0.400)"),
            ("attacks that succeed, by margin", 0.45, 0.3, "BIM, 8 (AUC 0.200)"),
        )
        for x, y, label in ((FALSE_ALARMS, [share] * len(FALSE_ALARMS), curve), (0.06, cross, "x"))
    ]


def test_attacked_at_even_distances(
    network: CapsNet, load_split: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of images that lie class by class some of each are attacked; of few all; perhaps none is mistaken."""
    dataset = load_split("test")
    by_class = data.take(dataset, dataset.labels.argsort(stable=True))
    right = ~evaluate(TorchPredictor(network), by_class).wrong
    attacked: list[Tensor] = []

    def attack(_: CapsNet, images: Tensor, labels: Tensor, *__: int) -> Tensor:
        attacked.append(labels)
        return images

    monkeypatch.setattr(detection, "ATTACKS", {"none": attack})
    calibration = Calibration(threshold=1, quantile=0.95, images=1, source="training")
    for most in (12, 1000):
        found = detection.measure(
            network, calibration, by_class, {}, attacked=most, epsilons=(1,), say=lambda _: None
        )
    assert len(attacked[0]) == 12
    assert set(attacked[0].tolist()) == {0, 1, 2}
    assert torch.equal(torch.cat(attacked[1:]), by_class.labels[torch.from_numpy(right)])
    (still,) = found["attacks"]
    assert (still["success"], still["auc"], still["curves"]) == (0, None, None), "nothing to find"


def test_outliers_without_fashion_mnist(tmp_path: Path) -> None:
    """Where Fashion-MNIST is not on this machine it is named as missing, and never fetched."""
    digits = Dataset("mnist", ("a", "b"), torch.zeros(4, 28, 28).byte(), torch.zeros(4).long(), {})
    kinds, missing = detection.outliers(digits, tmp_path)
    assert list(kinds) == ["noise", "blank pages", "letters", "garments"]
    assert missing == ["Fashion-MNIST"]
    assert detection.outliers(replace(digits, images=digits.images[:, :20]), tmp_path)[1] == []


def test_outliers_of_fashion_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its files are, as many of its test images are taken as of the data set, on its ground."""
    garments = Dataset("fashion-mnist", ("x", "y"), torch.ones(9, 28, 28).byte(), torch.zeros(9).long(), {})
    asked: list[object] = []

    def load(*arguments: object, download: bool) -> Dataset:
        asked.append((*arguments, download))
        return garments

    monkeypatch.setattr(data, "load", load)
    digits = Dataset("mnist", ("a", "b"), torch.zeros(4, 28, 28).byte(), torch.zeros(4).long(), {})
    kinds, missing = detection.outliers(digits, Path("here"))
    assert asked == [("fashion-mnist", "test", Path("here"), False)]
    assert kinds["Fashion-MNIST"].shape == (4, 28, 28)
    assert kinds["Fashion-MNIST"].unique().tolist() == [1]
    assert missing == []
    sheets = replace(digits, name="folder", images=255 - digits.images)
    assert detection.outliers(sheets, Path("here"))[0]["Fashion-MNIST"].unique().tolist() == [254]


def test_calibrated_as_an_export(network: CapsNet, run: Path, load_split: Load) -> None:
    """A run is held to the bounds that its export has in the manifest."""
    images, source = calibration_set(load_split("train"), checkpoints.read(run))
    found = calibrate(TorchPredictor(network), images, source)
    manifest = json.loads((run.parent / "models/shapes/1/manifest.json").read_text())
    expected = Calibration.model_validate(manifest["calibration"])
    assert (found.images, found.source, found.quantile) == (expected.images, expected.source, 0.95)
    assert found.threshold == pytest.approx(expected.threshold, rel=1e-4)
    assert found.margin == pytest.approx(expected.margin, abs=1e-5)


def test_what_to_calibrate_on(run: Path, load_split: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out images if there are enough, called so unless the weights that the run began with knew them."""
    training, checkpoint = load_split("train"), checkpoints.read(run)
    count = checkpoint.settings().validation_images
    assert count < export_module.LEAST_CALIBRATION_IMAGES
    images, source = calibration_set(training, checkpoint)
    assert (len(images), source) == (len(training), "training")
    monkeypatch.setattr(export_module, "LEAST_CALIBRATION_IMAGES", count)
    images, source = calibration_set(training, checkpoint)
    assert (len(images), source) == (count, "held-out")
    images, source = calibration_set(training, replace(checkpoint, start={"epochs": 1}))
    assert (len(images), source) == (count, "training")
    monkeypatch.setattr(export_module, "CALIBRATION_IMAGES", 2)
    images, source = calibration_set(training, checkpoint)
    assert (len(images), source) == (2, "held-out"), "no more than are needed"


def test_what_cannot_be_attacked(network: CapsNet, load_split: Load) -> None:
    """Attacks on nothing, in no step, or by nothing are refused; so are images of two, and mistaken ones."""
    dataset = load_split("test")
    calibration = Calibration(threshold=1, quantile=0.95, images=1, source="training")
    with pytest.raises(DataError, match="attacked is 0, expected at least 1"):
        detection.measure(network, calibration, dataset, {}, attacked=0)
    with pytest.raises(DataError, match="steps is 0, expected at least 1"):
        detection.measure(network, calibration, dataset, {}, steps=0)
    with pytest.raises(DataError, match="epsilon is -16, expected at least 1"):
        detection.measure(network, calibration, dataset, {}, epsilons=(8, -16))
    two = replace(dataset, labels=dataset.labels[:, None].repeat(1, 2))
    with pytest.raises(DataError, match="expected one class for each"):
        detection.measure(network, calibration, two, {})
    predicted = torch.from_numpy(evaluate(TorchPredictor(network), dataset).predictions)
    wrong = replace(dataset, labels=(predicted + 1) % 3)
    with pytest.raises(DataError, match="right about no image"):
        detection.measure(network, calibration, wrong, {})


def test_commands(mnist_style_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both commands take runs and leave a record and a figure; a CNN has curves, but nothing to detect by."""
    source = ["--dataset", "folder", "--data-dir", str(mnist_style_folder)]
    quick = ["--batch-size", "12", "--validation-images", "0", "--device", "cpu"]
    runs = [str(tmp_path / name) for name in ("efficient-capsnet", "baseline-cnn")]
    for run, epochs in zip(runs, ("20", "1"), strict=True):
        own = ["--architecture", Path(run).name, "--epochs", epochs, "--output", run]
        assert main(["train", *source, *quick, *own]) == 0
    out = ["--output", str(tmp_path / "out")]
    assert main(["robustness", *runs, *source, *out, "--images", "6"]) == 0
    record = json.loads((tmp_path / "out/robustness.json").read_text())
    assert [network["name"] for network in record["networks"]] == ["efficient-capsnet", "baseline-cnn"]
    assert record["images"] == 6
    few = ["--attacked", "3", "--epsilon", "90"]
    assert main(["detect", runs[0], *source, *out, *few]) == 0
    record = json.loads((tmp_path / "out/detection.json").read_text())
    assert record["network"]["training"]["architecture"] == "efficient-capsnet"
    assert record["calibration"]["source"] == "training"
    assert [attack["epsilon"] for attack in record["attacks"]] == [90, 90, 90]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{name}.{ending}" for name in ("robustness", "detection") for ending in ("json", "png")
    }
    assert main(["detect", runs[1], *source, *out, *few]) == 1
    assert "a CNN without capsules draws nothing" in capsys.readouterr().err
