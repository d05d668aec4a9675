"""From a checkpoint to a model folder: two ONNX graphs, a manifest and a model card, or nothing at all."""

import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from service.manifest import (
    Calibration,
    CapsuleSpec,
    Dimensions,
    Graph,
    ImageSpec,
    Manifest,
    Measured,
    Provenance,
    Start,
    TensorSpec,
    margins,
    sha256,
    write_manifest,
)
from training.baseline import BaselineCNN
from training.checkpoint import Checkpoint
from training.compose import as_seen
from training.config import TWEAK_RANGE, TWEAK_STEP, ModelConfig
from training.data import DataError, Dataset, Split, hold_out, on_light_ground
from training.dimensions import measure_dimensions
from training.evaluate import Evaluation, evaluate
from training.graphs import LARGE, OPSET, encoder_graph
from training.model import CapsNet, length
from training.model_card import model_card
from training.outliers import outliers
from training.predictor import OnnxPredictor, Predictor, TorchPredictor
from training.variants import measure_variants, write_variants

PARITY_BATCHES = (1, 2, 7, 64)
PARITY_TOLERANCE = 1e-4
"""Largest difference between ONNX Runtime and PyTorch that an exported model may show, in any output."""
CALIBRATION_IMAGES = 5000
RANGE_IMAGES = 1024
"""Of those, how many at most the 8-bit encoder takes its range from."""
LEAST_CALIBRATION_IMAGES = 100
"""By the bounds of fewer held-out images too many others would be unusual: of 3 half, of 12 a seventh, where
a twentieth is meant. Then all training images give them."""
CALIBRATION_QUANTILE = 0.95
CalibrationSource = Literal["held-out", "training"]
OUTLIERS = 500
"""Images of each kind that is of no class."""


class ExportError(Exception):
    """An export that was refused; nothing was written. The message says why."""


@dataclass(frozen=True)
class Name:
    """A model's place: `<root>/<name>/<version>`."""

    root: Path
    name: str
    version: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ExportError(f"name is {self.name!r}, expected letters, digits, '.', '_' and '-'")
        if not re.fullmatch(r"[1-9][0-9]*", self.version):
            raise ExportError(f"version is {self.version!r}, expected a whole number from 1")

    @property
    def folder(self) -> Path:
        return self.root / self.name / self.version


def export(
    checkpoint: Checkpoint,
    place: Name,
    load_split: Callable[[Split], Dataset],
) -> Manifest:
    """Export a checkpoint to `place.folder`, which appears complete or not at all.

    The weights are stored, and were rounded beforehand, in half precision; everything is computed in
    single precision. All figures in the manifest are of these exported graphs.

    Args:
        load_split: gives the `train` and `test` images that the checkpoint's network was trained for.

    Raises:
        ExportError: if the folder exists, if the data are not those of the training run, or if ONNX
            Runtime and PyTorch differ by more than `PARITY_TOLERANCE`.
        DataError: if the run had fewer images than there are.
    """
    if place.folder.exists():
        raise ExportError(f"{place.folder} exists; a version is never overwritten: choose the next one")
    training, test = load_split("train"), load_split("test")
    if training.checksums != checkpoint.dataset_checksums:
        raise ExportError(
            f"the {training.name} training images differ from those that the checkpoint was trained on: "
            f"sha256 {training.checksums}, expected {checkpoint.dataset_checksums}"
        )
    place.root.mkdir(parents=True, exist_ok=True)
    workshop = Path(tempfile.mkdtemp(prefix=".export-", dir=place.root))
    try:
        # The same last two folder names as the final place, since the manifest is checked against them.
        folder = workshop / place.name / place.version
        folder.mkdir(parents=True)
        manifest = _fill(folder, checkpoint, place, training, test)
        place.folder.parent.mkdir(exist_ok=True)
        os.rename(folder, place.folder)  # noqa: PTH104 - one atomic step, as os.replace elsewhere
    finally:
        shutil.rmtree(workshop)
    return manifest


def _fill(
    folder: Path,
    checkpoint: Checkpoint,
    place: Name,
    training: Dataset,
    test: Dataset,
) -> Manifest:
    network = checkpoint.network()
    if isinstance(network, BaselineCNN):
        raise ExportError("a baseline CNN has no capsules to serve; `capsnet evaluate` takes its checkpoint")
    calibration_images, source = calibration_set(training, checkpoint)
    round_to_half(network)
    config, train_config = network.config, checkpoint.settings()
    print("writing encoder.onnx and decoder.onnx")
    encoder = folder / "encoder.onnx"
    decoder = folder / "decoder.onnx"
    write_encoder(network, encoder)
    write_decoder(network, decoder)

    manifest = Manifest(
        name=place.name,
        version=place.version,
        created=datetime.now(UTC).replace(microsecond=0),
        classes=config.classes,
        labels_per_image=test.labels.shape[1] if test.labels.ndim == 2 else 1,
        architecture=config.architecture,
        image=image_spec(test),
        capsules=CapsuleSpec(
            primary_count=config.primary_count,
            primary_dimensions=config.primary_dimensions,
            digit_dimensions=config.digit_dimensions,
            routing_iterations=config.routing_iterations if config.architecture == "capsnet" else 1,
            tweak_range=TWEAK_RANGE,
            tweak_step=TWEAK_STEP,
        ),
        encoder=describe(encoder),
        decoder=describe(decoder),
        # Measured below, by the graphs that this first manifest lets us open.
        calibration=Calibration(
            threshold=1, quantile=CALIBRATION_QUANTILE, images=len(calibration_images), source="training"
        ),
        measured=Measured(test_images=0, test_mistakes=0, parity_error=0),
        provenance=Provenance(
            code_revision=checkpoint.code_revision,
            dataset=checkpoint.dataset,
            dataset_checksums={**training.checksums, **test.checksums},
            training_images=checkpoint.training_images,
            seed=train_config.seed,
            epochs=checkpoint.epoch,
            start=Start(**checkpoint.start) if checkpoint.start else None,
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            precision=train_config.precision,
        ),
    )
    files = {}
    if config.architecture == "capsnet":  # the others are small, and PyTorch's exporter writes them
        spread = -(-len(calibration_images) // RANGE_IMAGES)
        files = write_variants(network, calibration_images.images[::spread], encoder, decoder)
    write_manifest(folder, manifest)
    exported = OnnxPredictor(folder)
    parity = parity_error(exported, TorchPredictor(network), test)
    print(f"largest difference between ONNX Runtime and PyTorch: {parity:.2g}")
    if not parity <= PARITY_TOLERANCE:
        raise ExportError(
            f"ONNX Runtime and PyTorch differ by {parity:.3g}, expected at most {PARITY_TOLERANCE}; "
            "this is a fault of the exporter, please report it with the versions of torch and onnxruntime"
        )
    print(f"measuring on {len(test):,} test and {len(calibration_images):,} calibration images")
    result = evaluate(exported, test)
    calibration = calibrate(exported, calibration_images, source)
    meanings: Dimensions = {}
    if train_config.reconstruction_weight:  # or the decoder has learnt nothing
        print("measuring what each dimension means")
        light = manifest.image.polarity == "light_on_dark"
        meanings = measure_dimensions(exported, training, light_on_dark=light)
    manifest = manifest.model_copy(
        update={
            "dimensions": meanings,
            "variants": measure_variants(
                {precision: describe(file) for precision, file in files.items()}, exported, test
            ),
            "calibration": calibration,
            "measured": Measured(
                test_images=result.images,
                test_mistakes=result.mistakes,
                parity_error=parity,
                beyond_threshold={
                    "test": unusual(result, calibration),
                    **{
                        kind: unusual(
                            evaluate(exported, replace(test, images=images, labels=labels)), calibration
                        )
                        for kind, images, labels in outlier_sets(test)
                    },
                },
            ),
        }
    )
    write_manifest(folder, manifest)
    (folder / "MODEL_CARD.md").write_text(
        model_card(manifest, config, train_config, result), encoding="utf-8"
    )
    return manifest


def calibration_set(training: Dataset, checkpoint: Checkpoint) -> tuple[Dataset, CalibrationSource]:
    """Images of `training` to calibrate on: those that the run held out, or else some that it has seen.

    So are held-out ones called where the run began with another's weights, which may have learned from them.

    Raises:
        DataError: if the run had other images than all of these.
    """
    settings = checkpoint.settings()
    had = checkpoint.training_images + settings.validation_images
    if had != len(training):
        raise DataError(
            f"{training.name}: {len(training)} training images, but the run had {had}; which of them it has "
            "seen is not known, and so not what to calibrate on: train on all of them"
        )
    held_out = hold_out(training, settings.validation_images, settings.seed)[1]
    enough = len(held_out) >= LEAST_CALIBRATION_IMAGES
    images = held_out if enough else training
    some = images if len(images) <= CALIBRATION_IMAGES else hold_out(images, CALIBRATION_IMAGES, seed=0)[1]
    return as_seen(some), "held-out" if enough and checkpoint.start is None else "training"


def calibrate(predictor: Predictor, images: Dataset, source: CalibrationSource) -> Calibration:
    """The bounds within which `images` usually lie."""
    threshold, margin = bounds(evaluate(predictor, images), CALIBRATION_QUANTILE)
    return Calibration(
        threshold=threshold,
        margin=margin,
        quantile=CALIBRATION_QUANTILE,
        images=len(images),
        source=source,
    )


def bounds(evaluation: Evaluation, share: float) -> tuple[float, float]:
    """Largest error and least margin between which `share` of the images lie, cutting off as many by each."""
    leads = margins(evaluation.lengths)
    # By how many of the images each is surpassed, in either respect: the worse of the two counts.
    worse = np.maximum(_ranks(evaluation.reconstruction_errors), _ranks(-leads))
    inside = worse <= np.quantile(worse, share)
    return float(evaluation.reconstruction_errors[inside].max()), float(leads[inside].min())


def _ranks(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """How many of the values are smaller than each."""
    return np.searchsorted(np.sort(values), values)


def unusual(evaluation: Evaluation, calibration: Calibration) -> float:
    """Share of the images that are beyond the calibrated bounds, in per cent."""
    usual = calibration.usual(evaluation.reconstruction_errors, evaluation.lengths)
    return 100 * float(1 - usual.mean())


def outlier_sets(dataset: Dataset) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Kinds of images that are of no class: name, images like those of `dataset`, labels of no meaning."""
    light = image_spec(dataset).polarity == "light_on_dark"
    for kind, made in outliers(tuple(dataset.images.shape[1:]), OUTLIERS).items():
        images = torch.from_numpy(made if light else 255 - made)
        yield kind, images, torch.zeros(len(images), dtype=torch.int64)


def image_spec(dataset: Dataset) -> ImageSpec:
    """What an image must look like to be like those of `dataset`; its borders tell the ink's polarity."""
    images = dataset.images
    mnist = dataset.name == "mnist"
    return ImageSpec(
        height=images.shape[1],
        width=images.shape[2],
        channels=3 if images.ndim == 4 else 1,
        polarity="dark_on_light" if on_light_ground(images) else "light_on_dark",
        centring="centre_of_mass" if mnist else "none",
        box=20 if mnist else None,  # the side of the box that MNIST's digits were scaled into
    )


@torch.no_grad()
def round_to_half(network: nn.Module) -> None:
    """Round the weights to what half precision can hold, so that storing them in it loses nothing more.

    Raises:
        ExportError: one is too large for it.
    """
    for name, parameter in network.named_parameters():
        if not parameter.half().isfinite().all():
            raise ExportError(
                f"{name} has weights up to {parameter.abs().max():.3g}, expected at most 65504, the largest "
                "number in half precision; train again, with a lower --learning-rate"
            )
        parameter.copy_(parameter.half())


class _EncoderGraph(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        capsules = self.encoder(images)
        return capsules, length(capsules)


def write_encoder(network: CapsNet, path: Path) -> None:
    """Write the graph `images` -> `digit_capsules`, `capsule_lengths`."""
    if network.config.architecture == "capsnet":
        model = encoder_graph(network)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)
        return
    write_traced_encoder(network.encoder, network.config, path)


def write_traced_encoder(encoder: nn.Module, config: ModelConfig, path: Path) -> None:
    """Write any module that makes capsules of images by PyTorch's exporter, with lengths beside them."""
    images = torch.zeros(3, *config.image_shape, dtype=torch.uint8)
    _write(_EncoderGraph(encoder), {"images": images}, ["digit_capsules", "capsule_lengths"], path)


def write_decoder(network: CapsNet, path: Path) -> None:
    """Write the graph `digit_capsules`, `target` -> `reconstructions`."""
    capsules, target = decoder_example(network.config)
    _write(network.decoder, {"digit_capsules": capsules, "target": target}, ["reconstructions"], path)


def decoder_example(config: ModelConfig) -> tuple[Tensor, Tensor]:
    return (
        torch.zeros(3, len(config.classes), config.digit_dimensions),
        torch.zeros(3, dtype=torch.int64),
    )


def _write(module: nn.Module, inputs: dict[str, Tensor], outputs: list[str], path: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        # PyTorch's exporter warns of its own internals: of an axis name given twice, of a class it replaces.
        warnings.filterwarnings("ignore", "# The axis name", UserWarning)
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        # …and logs each operator of torchvision, which is not used here, as missing.
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise ExportError("PyTorch's exporter returned no program")
    model = program.model_proto
    store_in_half(model)
    del model.metadata_props[:]
    for node in model.graph.node:  # the exporter's notes name files on this machine
        del node.metadata_props[:]
        node.doc_string = ""
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def store_in_half(model: onnx.ModelProto) -> None:
    """Store large fp32 weights as fp16 with a Cast behind them, which ONNX Runtime folds when it loads."""
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or int(np.prod(tensor.dims)) < LARGE:
            continue
        name = tensor.name
        stored = f"{name}.half"
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), stored))
        casts.append(helper.make_node("Cast", [stored], [name], name=f"{name}.single", to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]  # shapes of intermediate values are inferred again by every runtime


_DATATYPES: dict[int, str] = {
    TensorProto.UINT8: "UINT8",
    TensorProto.INT64: "INT64",
    TensorProto.FLOAT: "FP32",
}


def describe(path: Path) -> Graph:
    """What the manifest says of a graph, read from the file itself."""
    model = onnx.load(path)

    def tensors(values: list[onnx.ValueInfoProto]) -> Iterator[TensorSpec]:
        for value in values:
            kind = value.type.tensor_type
            yield TensorSpec.model_validate(
                {
                    "name": value.name,
                    "datatype": _DATATYPES[kind.elem_type],
                    "shape": [axis.dim_value or -1 for axis in kind.shape.dim],
                }
            )

    return Graph(
        file=path.name,
        sha256=sha256(path),
        opset=next(entry.version for entry in model.opset_import if entry.domain == ""),
        inputs=tuple(tensors(list(model.graph.input))),
        outputs=tuple(tensors(list(model.graph.output))),
    )


def parity_error(exported: Predictor, reference: Predictor, dataset: Dataset) -> float:
    """Largest absolute difference of any output at several batch sizes, on images of different classes.

    The class to draw differs from row to row too, so that a graph with one mask baked in is found out.
    """
    worst = 0.0
    indices = _spread(dataset)
    for size in PARITY_BATCHES:
        images = dataset.images[indices[:size]].numpy()
        capsules, lengths = reference.encode(images)
        target = np.arange(len(images), dtype=np.int64) % len(dataset.classes)
        pairs = [
            *zip(exported.encode(images), (capsules, lengths), strict=True),
            (exported.decode(capsules, target), reference.decode(capsules, target)),
        ]
        # np.max, because Python's max would let NaN pass for the smaller of two numbers.
        worst = float(np.max([worst, *(np.abs(found - expected).max() for found, expected in pairs)]))
    return worst


def _spread(dataset: Dataset) -> NDArray[np.int64]:
    """Indices of images, class after class in turn, as many as the largest comparison takes."""
    labels = dataset.labels.numpy()
    rounds = max(PARITY_BATCHES)
    labels = labels if labels.ndim == 1 else labels[:, 0]
    by_class = [np.resize(np.flatnonzero(labels == k), rounds) for k in range(len(dataset.classes))]
    return np.stack(by_class, axis=1).reshape(-1)[:rounds]
