from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from service.manifest import Dimensions, ManifestError, read_manifest, sha256
from training import export as exporting
from training.checkpoint import Checkpoint
from training.config import ModelConfig, TrainConfig
from training.data import DataError, Dataset, Split
from training.evaluate import Evaluation, evaluate
from training.export import (
    ExportError,
    Name,
    bounds,
    export,
    image_spec,
    outlier_sets,
    parity_error,
    round_to_half,
)
from training.model import CapsNet
from training.model_card import model_card
from training.predictor import Floats, Labels, OnnxPredictor, TorchPredictor
from training.train import train

Load = Callable[[Split], Dataset]


@pytest.fixture(scope="module")
def state(
    model_config: ModelConfig,
    train_config: TrainConfig,
    load_split: Load,
    tmp_path_factory: pytest.TempPathFactory,
) -> Checkpoint:
    """A short run; like the export below, it serves all tests of this file."""
    return train(
        load_split("train"),
        model_config,
        replace(train_config, epochs=6),
        tmp_path_factory.mktemp("run"),
        load_test=lambda: load_split("test"),
    )


@pytest.fixture(scope="module")
def exported(state: Checkpoint, load_split: Load, tmp_path_factory: pytest.TempPathFactory) -> Name:
    place = Name(tmp_path_factory.mktemp("export") / "models", "shapes", "1")
    export(state, place, load_split)
    return place


@pytest.fixture
def place(tmp_path: Path) -> Name:
    return Name(tmp_path / "models", "shapes", "1")


def test_export(state: Checkpoint, exported: Name, load_split: Load) -> None:
    """An export is a complete model folder that the service's own reader accepts."""
    manifest = read_manifest(exported.folder)
    assert sorted(path.name for path in exported.folder.iterdir()) == [
        "MODEL_CARD.md",
        "decoder.onnx",
        "encoder.fp16.onnx",
        "encoder.int8.onnx",
        "encoder.onnx",
        "encoder.winograd.onnx",
        "manifest.json",
    ]
    assert manifest.classes == ("bar", "pole", "dot")
    assert manifest.image.shape == (13, 12)
    assert manifest.capsule_shape == (3, 6)
    result = evaluate(OnnxPredictor(exported.folder), load_split("test"))
    assert (manifest.measured.test_images, manifest.measured.test_mistakes) == (66, result.mistakes)
    assert manifest.measured.test_error == result.error
    assert 0 < manifest.measured.parity_error < 1e-4
    # Six images are held out, too few to say what is usual.
    assert (manifest.calibration.source, manifest.calibration.images) == ("training", 66)
    assert manifest.calibration.quantile == 0.95
    assert manifest.calibration.threshold > 0
    assert 0 <= manifest.calibration.margin < 1
    provenance = manifest.provenance
    assert provenance.dataset_checksums == {"train": "train shapes", "test": "test shapes"}
    assert (provenance.training_images, provenance.epochs) == (60, 6)
    assert provenance.parameters == sum(weight.numel() for weight in state.network().parameters())
    assert set(manifest.measured.beyond_threshold) == {"test", "noise", "blank pages", "letters", "garments"}
    usual = manifest.calibration.usual(result.reconstruction_errors, result.lengths)
    assert manifest.measured.beyond_threshold["test"] == pytest.approx(100 * (1 - usual.mean()))
    for kind, images, labels in outlier_sets(load_split("test")):
        of_none = replace(load_split("test"), images=images, labels=labels)
        found = evaluate(OnnxPredictor(exported.folder), of_none)
        usual = manifest.calibration.usual(found.reconstruction_errors, found.lengths)
        assert manifest.measured.beyond_threshold[kind] == pytest.approx(100 * (1 - usual.mean())), kind
    known = evaluate(OnnxPredictor(exported.folder), load_split("train"))
    usual = manifest.calibration.usual(known.reconstruction_errors, known.lengths)
    assert usual.mean() == pytest.approx(0.95, abs=1 / 66)
    assert [variant.precision for variant in manifest.variants] == ["fp32", "fp16", "int8"]
    for_cpus = onnx.load(exported.folder / "encoder.winograd.onnx", load_external_data=False).graph
    assert any(node.op_type == "Slice" and node.input[0] == "images" for node in for_cpus.node), "two ways"
    assert all(manifest.as_good(variant) for variant in manifest.variants)
    assert set(manifest.dimensions) <= {"bar", "pole", "dot"}
    assert manifest.dimensions, "the classes that are recognised"
    card = (exported.folder / "MODEL_CARD.md").read_text()
    assert all(f"**5** {dimensions[5].name} |" in card for dimensions in manifest.dimensions.values())
    assert f"({manifest.measured.test_mistakes} of 66)" in card
    assert list(exported.root.iterdir()) == [exported.root / "shapes"], "the workshop is cleared away"


def test_parity_at_many_batch_sizes(state: Checkpoint, exported: Name, load_split: Load) -> None:
    """ONNX Runtime and PyTorch agree to 1e-4 at batch sizes 1, 2, 7 and 64."""
    network = state.network()
    round_to_half(network)
    found, reference = OnnxPredictor(exported.folder), TorchPredictor(network)
    images = load_split("test").images.numpy()
    for size in (1, 2, 7, 64):
        capsules, lengths = found.encode(images[:size])
        expected_capsules, expected_lengths = reference.encode(images[:size])
        np.testing.assert_allclose(capsules, expected_capsules, atol=1e-4)
        np.testing.assert_allclose(lengths, expected_lengths, atol=1e-4)
        target = np.arange(size) % 3
        np.testing.assert_allclose(
            found.decode(capsules, target), reference.decode(expected_capsules, target), atol=1e-4
        )


def test_masking_is_in_the_graph(exported: Name) -> None:
    """The exported decoder draws from the target's capsule alone, for each row's own target."""
    predictor = OnnxPredictor(exported.folder)
    capsules = np.random.default_rng(0).normal(size=(3, 3, 6)).astype(np.float32)
    target = np.array([2, 0, 1])
    before = predictor.decode(capsules, target)
    for row, k in enumerate(target):
        capsules[row, np.arange(3) != k] = 9
    np.testing.assert_array_equal(predictor.decode(capsules, target), before)


def test_weights_are_stored_in_half_precision(exported: Name) -> None:
    """Large weights take two bytes each in the file, and are computed with in single precision."""
    model = onnx.load(exported.folder / "encoder.onnx")
    large = [t for t in model.graph.initializer if np.prod(t.dims) >= 1024]
    assert large
    assert all(t.data_type == onnx.TensorProto.FLOAT16 for t in large)
    session = ort.InferenceSession(exported.folder / "encoder.onnx", providers=["CPUExecutionProvider"])
    assert {output.type for output in session.get_outputs()} == {"tensor(float)"}


def test_no_notes_of_the_exporters_machine(exported: Name) -> None:
    """The graphs name no file of the machine that made them."""
    for name in ("encoder.onnx", "decoder.onnx"):
        assert str(Path(exporting.__file__).parent).encode() not in (exported.folder / name).read_bytes()


def test_a_version_is_never_overwritten(state: Checkpoint, exported: Name, load_split: Load) -> None:
    """Exporting to an existing version is refused and leaves it as it was."""
    before = {path.name: sha256(path) for path in exported.folder.iterdir()}
    with pytest.raises(ExportError, match=r"1 exists; a version is never overwritten"):
        export(state, exported, load_split)
    assert {path.name: sha256(path) for path in exported.folder.iterdir()} == before


def test_other_data(state: Checkpoint, load_split: Load, place: Name) -> None:
    """Images other than those trained on cannot calibrate a model."""

    def other(split: Split) -> Dataset:
        return replace(load_split(split), checksums={split: "something else"})

    with pytest.raises(ExportError, match="training images differ"):
        export(state, place, other)
    assert not place.root.exists()


def test_a_run_on_a_part_of_the_images(state: Checkpoint, load_split: Load, place: Name) -> None:
    """Of a run that had the first images alone, as small ones do, nobody can say which it has not seen."""
    with pytest.raises(DataError, match="66 training images, but the run had 26"):
        export(replace(state, training_images=20), place, load_split)
    assert list(place.root.iterdir()) == []


def test_a_card_says_what_is_known(state: Checkpoint, exported: Name, load_split: Load) -> None:
    """A card says when the network was tested, and by what images its precision is chosen; no more."""
    card = (exported.folder / "MODEL_CARD.md").read_text()
    assert "It was tested after the last epoch. Which precision a service takes" in card
    assert "fixed before" not in card
    assert "in fp16, computed by ONNX's reference implementation" in card, "ONNX Runtime would not round"
    assert "Sabour, Frosst and Hinton" in card
    manifest, result = (
        read_manifest(exported.folder),
        evaluate(OnnxPredictor(exported.folder), load_split("test")),
    )
    longer = replace(state.settings(), epochs=9, warm_up_steps=100)
    plain = manifest.model_copy(update={"variants": ()})
    card = model_card(plain, state.shape(), longer, result)
    assert "it stands at epoch 6 of 9.\n\n## Limits" in card
    assert "| warm-up | 24 of 40 steps |" in card, "and not of the hundred that a longer run would take"
    slower = replace(state.settings(), warm_up_steps=20)
    assert "| warm-up | 20 steps |" in model_card(plain, state.shape(), slower, result)


def test_a_decoder_that_learnt_nothing_has_no_names(state: Checkpoint, load_split: Load, place: Name) -> None:
    """Of a network that was trained without reconstruction nothing is said of its dimensions."""
    settings = {**state.train_config, "reconstruction_weight": 0}
    assert export(replace(state, train_config=settings), place, load_split).dimensions == {}
    assert "That was not measured." in (place.folder / "MODEL_CARD.md").read_text()


def test_what_dimensions_are_measured_on(
    state: Checkpoint, load_split: Load, place: Name, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dimensions are named by the training images, never the test images, in whatever ink they are, and of an
    unfinished run the manifest says how far it came."""
    asked: list[tuple[dict[str, str], bool]] = []

    def dark(split: Split) -> Dataset:
        dataset = load_split(split)
        return replace(dataset, images=255 - dataset.images)

    def measure(_: OnnxPredictor, dataset: Dataset, *, light_on_dark: bool) -> Dimensions:
        asked.append((dict(dataset.checksums), light_on_dark))
        return {}

    monkeypatch.setattr(exporting, "measure_dimensions", measure)
    assert export(replace(state, epoch=4), place, dark).provenance.epochs == 4
    assert asked == [({"train": "train shapes"}, False)]


def test_baked_in_mask(
    state: Checkpoint, load_split: Load, place: Name, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder that always draws the traced class is found out, and nothing is written."""

    class Baked(torch.nn.Module):
        def __init__(self, network: CapsNet) -> None:
            super().__init__()
            self.decoder = network.decoder

        def forward(self, capsules: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            reconstructions: torch.Tensor = self.decoder(capsules, target * 0)
            return reconstructions

    def write_baked(network: CapsNet, path: Path) -> None:
        capsules, target = exporting.decoder_example(network.config)
        exporting._write(
            Baked(network), {"digit_capsules": capsules, "target": target}, ["reconstructions"], path
        )

    monkeypatch.setattr(exporting, "write_decoder", write_baked)
    with pytest.raises(ExportError, match="ONNX Runtime and PyTorch differ by"):
        export(state, place, load_split)
    assert list(place.root.iterdir()) == []


def test_frozen_batch(
    state: Checkpoint, load_split: Load, place: Name, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder whose batch size is that of the example is refused, and nothing is written."""
    dynamic = torch.onnx.export

    def static(*arguments: object, dynamic_shapes: object, **options: object) -> object:
        return dynamic(*arguments, **options)  # type: ignore[arg-type] # as the exporter gave them

    monkeypatch.setattr(torch.onnx, "export", static)
    with pytest.raises(ManifestError, match=r"decoder.inputs is .*, expected"):
        export(state, place, load_split)
    assert list(place.root.iterdir()) == []


def test_outputs_that_are_no_numbers(state: Checkpoint, load_split: Load) -> None:
    """NaN on one side is a difference, not an agreement."""

    class Broken(TorchPredictor):
        def decode(self, capsules: Floats, target: Labels) -> Floats:
            return super().decode(capsules, target) * np.float32(np.nan)

    network = state.network()
    assert np.isnan(parity_error(Broken(network), TorchPredictor(network), load_split("test")))


def test_colour_network(
    tmp_path: Path, model_config: ModelConfig, train_config: TrainConfig, load_split: Load
) -> None:
    """A network for colour images exports with (B, H, W, 3) in and out."""

    def colour(split: Split) -> Dataset:
        grey = load_split(split)
        return replace(grey, images=grey.images.unsqueeze(-1) * torch.tensor([1, 1, 0], dtype=torch.uint8))

    state = train(
        colour("train"), replace(model_config, channels=3, shared_weights=True),
        replace(train_config, epochs=1), tmp_path / "run", load_test=lambda: colour("test"),
    )  # fmt: skip
    manifest = export(state, Name(tmp_path / "models", "colour", "2"), colour)
    assert manifest.encoder.inputs[0].shape == (-1, 13, 12, 3)
    assert manifest.decoder.outputs[0].shape == (-1, 13, 12, 3)


def test_image_spec_reads_the_polarity(load_split: Load) -> None:
    """Dark borders mean light ink, light borders dark ink; only MNIST is centred by its centre of mass."""
    dataset = load_split("test")
    assert image_spec(dataset).polarity == "light_on_dark"
    assert image_spec(replace(dataset, images=255 - dataset.images)).polarity == "dark_on_light"
    assert image_spec(dataset).centring == "none"
    mnist = replace(dataset, name="mnist", images=torch.zeros(2, 28, 28, dtype=torch.uint8))
    assert image_spec(mnist).centring == "centre_of_mass"


def test_weights_that_half_precision_cannot_hold_are_refused(
    state: Checkpoint, load_split: Load, place: Name
) -> None:
    """A training that ran away is said to have done so, and nothing is written."""
    weights = {name: weight.clone() for name, weight in state.model.items()}
    weights["encoder.conv.weight"].view(-1)[0] = -1e5
    with pytest.raises(ExportError, match=r"conv\.weight has weights up to 1e\+05, expected at most"):
        export(replace(state, model=weights), place, load_split)
    assert not place.folder.exists()


def test_images_of_no_class_have_the_ink_of_the_others(load_split: Load) -> None:
    """Letters that no network knows are light on a dark ground, or dark on a light one."""
    dataset = load_split("test")
    for ground, images in ((0, dataset.images), (255, 255 - dataset.images)):
        made = {kind: drawn for kind, drawn, _ in outlier_sets(replace(dataset, images=images))}
        assert (made["letters"][:, 0, 0] == ground).all()


@pytest.mark.parametrize(("name", "version"), [("../up", "1"), ("mnist", "v2"), ("mnist", "0"), ("", "1")])
def test_impossible_names(tmp_path: Path, name: str, version: str) -> None:
    """Names and versions that could not be served are refused before any work is done."""
    with pytest.raises(ExportError, match="expected"):
        Name(tmp_path, name, version)


def test_bounds_hold_the_share_and_cut_by_both() -> None:
    """The bounds keep the asked share, and cut off about as many images by error as by margin."""
    random = np.random.default_rng(0)
    count = 4000
    lengths = np.zeros((count, 3), np.float32)
    lengths[:, 1] = random.uniform(0, 1, count)
    evaluation = Evaluation(
        labels=np.zeros(count, np.int64),
        predictions=np.zeros(count, np.int64),
        reconstruction_errors=random.uniform(0, 50, count).astype(np.float32),
        lengths=lengths,
    )
    error, margin = bounds(evaluation, 0.95)
    by_error = evaluation.reconstruction_errors > error
    by_margin = lengths[:, 1] < margin
    assert 1 - (by_error | by_margin).mean() == pytest.approx(0.95, abs=0.002)
    assert by_error.mean() == pytest.approx(by_margin.mean(), abs=0.01)
