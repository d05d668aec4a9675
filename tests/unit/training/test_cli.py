import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from service.manifest import read_manifest, write_manifest
from training import checkpoint as checkpoints
from training import cli, compose, data
from training.cli import main
from training.config import ModelConfig, TrainConfig
from training.data import Dataset, Split
from training.model_card import meaning, renew_meaning
from training.train import train


@pytest.mark.parametrize("command", ["train", "evaluate", "export", "dimensions", "visualize"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command explains itself and where its data come from."""
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "--data-dir" in printed
    assert "None" not in printed  # of what has no default it says what happens instead


def test_from_images_to_model(
    mnist_style_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A folder of one's own images becomes a trained, evaluated, exported and drawn network."""
    source = ["--dataset", "folder", "--data-dir", str(mnist_style_folder)]
    run, models = str(tmp_path / "run"), str(tmp_path / "models")
    settings = ["--epochs", "1", "--batch-size", "4", "--validation-images", "2", "--device", "cpu"]
    assert main(["train", *source, "--output", run, *settings]) == 0
    assert main(["evaluate", run, *source, "--device", "cpu"]) == 0
    assert main(["export", run, *source, "--models", models, "--name", "shapes", "--version", "3"]) == 0
    exported = f"{models}/shapes/3"
    assert main(["evaluate", exported, *source]) == 0
    assert (
        main(["visualize", exported, *source, "--output", str(tmp_path / "figures"), "--label", "bar"]) == 0
    )
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "reconstructions.png",
        "dimensions-bar.png",
    }
    printed = capsys.readouterr().out
    assert printed.count("test error") == 4, "training, both evaluations, and the export"
    monkeypatch.setattr(data, "load", partial(data.load, download=False))
    # Where no data set is named, MNIST is meant; it must not be loaded, or even downloaded, for nothing.
    for command in ("evaluate", "export", "visualize", "robustness", "detect"):
        assert main([command, run, "--data-dir", str(tmp_path / "nowhere")]) == 1
        assert capsys.readouterr().err == (
            f"capsnet: {run}: trained on folder, not mnist: add --dataset folder --data-dir <its folder>\n"
        )
    for command in ("evaluate", "dimensions"):
        assert main([command, exported, "--data-dir", str(tmp_path / "nowhere")]) == 1
        assert f"{exported}: trained on folder, not mnist" in capsys.readouterr().err
    # Other images can be named to measure on, but not to export with.
    for command, message in {"evaluate": "not to be downloaded", "export": "trained on folder"}.items():
        arguments = [command, run, "--dataset", "mnist", "--data-dir", str(tmp_path / "nowhere")]
        assert main(arguments) == 1
        assert message in capsys.readouterr().err


def test_few_images(mnist_style_folder: Path, tmp_path: Path) -> None:
    """Of 12 images of one's own, one is held out and eight are a batch, unless told otherwise."""
    source = ["--dataset", "folder", "--data-dir", str(mnist_style_folder)]
    assert (
        main(["train", *source, "--epochs", "1", "--device", "cpu", "--output", str(tmp_path / "run")]) == 0
    )
    saved = checkpoints.read(tmp_path / "run")
    assert (saved.training_images, saved.settings().batch_size) == (11, 8)


def test_a_slow_run_becomes_no_faster(mnist_style_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate below the usual final one stays as it is, unless a lower one is named."""
    configs: list[TrainConfig] = []
    monkeypatch.setattr(cli, "train", lambda _, __, config, *___, **____: configs.append(config))
    train = ["train", "--dataset", "folder", "--data-dir", str(mnist_style_folder)]
    for rates in ([], ["--learning-rate", "1e-6"], ["--final-learning-rate", "1e-6"]):
        assert main([*train, *rates]) == 0
    assert [(config.learning_rate, config.final_learning_rate) for config in configs] == [
        (1e-3, 1e-5),
        (1e-6, 1e-6),
        (1e-3, 1e-6),
    ]
    # One that began before that rose to the usual one, and goes on as it began.
    assert main([*train, "--resume", "--learning-rate", "1e-6", "--final-learning-rate", "1e-5"]) == 0
    assert configs[-1].final_learning_rate == 1e-5


def test_dimensions_of_a_model_that_names_none(
    mnist_style_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The command brings an older model's manifest and card to where an export would have left them."""
    for path in mnist_style_folder.glob("test/*/*.png"):  # or it would not show which images are measured on
        Image.open(path).point(lambda shade: shade // 2).save(path)
    source = ["--dataset", "folder", "--data-dir", str(mnist_style_folder)]
    run, models, figures = (str(tmp_path / name) for name in ("run", "models", "figures"))
    settings = ["--epochs", "8", "--batch-size", "4", "--validation-images", "2", "--device", "cpu"]
    assert main(["train", *source, "--output", run, *settings]) == 0
    assert main(["export", run, *source, "--models", models, "--name", "shapes"]) == 0
    folder = Path(models, "shapes", "1")
    manifest, card = read_manifest(folder), (folder / "MODEL_CARD.md").read_text()
    assert manifest.dimensions
    older = manifest.model_copy(update={"dimensions": {}})
    write_manifest(folder, older)
    for text in (card, renew_meaning(card, older), card.replace(meaning(manifest) + "\n", "")):
        (folder / "MODEL_CARD.md").write_text(text)
        assert main(["dimensions", str(folder), *source, "--output", figures]) == 0
        assert read_manifest(folder) == manifest
        assert (folder / "MODEL_CARD.md").read_text() == card
    assert Path(figures, "effects.png").is_file()
    assert "the dimensions are named in" in capsys.readouterr().out
    # Nor is anything written where none of them is recognised.
    with monkeypatch.context() as patch:
        patch.setattr("training.dimensions._recognised", lambda *_: [])
        assert main(["dimensions", str(folder), *source, "--output", figures]) == 1
        assert "no image from which a dimension's meaning could be measured" in capsys.readouterr().err
        assert read_manifest(folder) == manifest
    # Other images tell nothing of this model, and must not rename its dimensions.
    refusals = {17: "not the images that shapes/1 was trained on", 19: "images of shape (19, 19)"}
    for size, message in refusals.items():
        for path in mnist_style_folder.glob("*/*/*.png"):
            Image.open(path).resize((size, size)).transpose(Image.Transpose.TRANSPOSE).save(path)
        assert main(["dimensions", str(folder), *source, "--output", figures]) == 1
        assert message in capsys.readouterr().err
        assert read_manifest(folder) == manifest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nowhere"], "nowhere: no such checkpoint"),
        (["export", "nowhere"], "nowhere: no such checkpoint"),
        (["dimensions", "nowhere"], "nowhere/manifest.json: cannot be read"),
        (["robustness", "nowhere", "--seed", str(2**63)], f"seed is {2**63}, expected a whole number from 0"),
        (["robustness", "nowhere", "--seed", "-1"], "seed is -1, expected a whole number from 0"),
        (["export", "file", "--models", "models"], "file: not a readable checkpoint"),
        (["train", "--dataset", "folder", "--data-dir", "nowhere"], "nowhere/train: no such folder"),
        (
            ["train", "--augmentation", "strong", "--max-shift", "1"],
            "--max-shift goes with --augmentation shift",
        ),
        (
            ["train", "--data-dir", "file", "--schedule", "authors", "--final-learning-rate", "1e-4"],
            "--final-learning-rate goes with --schedule exponential",
        ),
        (
            ["train", "--learning-rate", "1e-5", "--final-learning-rate", "1e-4"],
            "--final-learning-rate is 0.0001, expected at most --learning-rate, 1e-05",
        ),
    ],
)
def test_errors(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fault ends the command with status 1 and one line, not a traceback."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_out_of_memory(
    mnist_style_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """More memory than there is ends the command with a line that says what to change; other faults show."""
    arguments = ["train", "--dataset", "folder", "--data-dir", str(mnist_style_folder)]
    monkeypatch.setattr(cli, "train", lambda *_, **__: torch.empty(2**60, dtype=torch.uint8))
    assert main(arguments) == 1
    assert "out of memory; try a smaller --batch-size" in capsys.readouterr().err
    monkeypatch.setattr(cli, "train", lambda *_, **__: torch.empty(2) @ torch.empty(3))
    with pytest.raises(RuntimeError, match="size"):
        main(arguments)


def test_termination(
    model_config: ModelConfig,
    train_config: TrainConfig,
    load_split: Callable[[Split], Dataset],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGTERM amid an export ends it with the status that a shell reports, and leaves nothing behind."""

    def load(split: Split) -> Dataset:
        return replace(load_split(split), name="mnist")

    def terminate(*_: object) -> None:
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL, "it would end these tests"
        signal.raise_signal(signal.SIGTERM)

    config = replace(train_config, epochs=1)
    train(load("train"), model_config, config, tmp_path / "run", load_test=lambda: load("test"))
    monkeypatch.setattr(compose, "load", lambda _, split, __: load(split))
    monkeypatch.setattr("training.export.write_decoder", terminate)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        main(["export", str(tmp_path / "run"), "--models", str(tmp_path / "models")])
    assert stop.value.code == 143
    assert list((tmp_path / "models").iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_full_disk(mnist_style_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What could not be written is named, with what to do; no half of it stays, and a run goes on."""
    source = ["--dataset", "folder", "--data-dir", str(mnist_style_folder), "--validation-images", "0"]
    train_it = ["train", *source, "--epochs", "1", "--output", str(tmp_path / "run")]
    partial = tmp_path / "run" / "result.json.partial"
    partial.parent.mkdir()
    partial.symlink_to("/dev/full")
    assert main(train_it) == 1
    error = capsys.readouterr().err
    assert f"No space left on device: '{tmp_path / 'run' / 'result.json'}'; free some and try again" in error
    assert "(a run of training with --resume)" in error
    assert not partial.is_symlink()
    assert main([*train_it, "--resume"]) == 0


def test_a_cnn(mnist_style_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A CNN trains with the largest seed there is, and is evaluated without a word of drawings."""
    source = ["--dataset", "folder", "--data-dir", str(mnist_style_folder), "--device", "cpu"]
    quick = ["--architecture", "baseline-cnn", "--epochs", "1", "--seed", str(2**63 - 1)]
    assert main(["train", *source, *quick, "--output", str(tmp_path / "run")]) == 0
    assert main(["evaluate", str(tmp_path / "run"), *source]) == 0
    figures = str(tmp_path / "figures")
    assert main(["visualize", str(tmp_path / "run"), *source[:4], "--output", figures]) == 1
    printed, error = capsys.readouterr()
    assert f"{tmp_path / 'run'}: a CNN without capsules draws nothing" in error
    assert not (tmp_path / "figures").exists()
    assert printed.count("test error") == 2
    assert "reconstruction error" not in printed


def test_output_that_cannot_be_written(
    mnist_style_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A place that cannot be written to is one line, with the place in it."""
    (tmp_path / "file").write_text("not a folder")
    source = ["--dataset", "folder", "--data-dir", str(mnist_style_folder), "--validation-images", "0"]
    assert main(["train", *source, "--epochs", "1", "--output", str(tmp_path / "file" / "run")]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err
    assert main(["train", *source, "--epochs", "1", "--output", str(tmp_path / "file")]) == 1
    assert f"{tmp_path / 'file'} is a file; choose another --output" in capsys.readouterr().err
