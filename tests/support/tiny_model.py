"""A model folder whose answers can be worked out by hand, built without torch.

Classes are ten horizontal bands of the image. The encoder measures how much light falls on each band:
capsule `c` is (light of band c, 0, 0, …), and its length is that light. The decoder lights band `target`
with the sum of that capsule's components, so that every dimension moves the image and every other
capsule is masked.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from service.manifest import (
    Calibration,
    CapsuleSpec,
    Dimension,
    Effect,
    Graph,
    ImageSpec,
    Manifest,
    Measured,
    Provenance,
    TensorSpec,
    sha256,
    write_manifest,
)

CLASSES = 10
DIMENSIONS = 16
SIDE = 28
OPSET = 18

_ELEMENTS = {"UINT8": TensorProto.UINT8, "INT64": TensorProto.INT64, "FP32": TensorProto.FLOAT}


def band(index: int) -> slice:
    """The rows of class `index`'s band: two rows each from row 4, so that the border stays empty."""
    return slice(4 + 2 * index, 6 + 2 * index)


def image_of(index: int, level: int = 255, channels: int = 1) -> NDArray[np.uint8]:
    """An image that the encoder takes for class `index`, with a capsule of length level / 255."""
    image = np.zeros((SIDE, SIDE) if channels == 1 else (SIDE, SIDE, channels), np.uint8)
    image[band(index), 4:24] = level
    return image


def capsules_of(*classes: int) -> NDArray[np.float32]:
    """Capsule sets (N, classes, dimensions) that the decoder draws as full bands."""
    capsules = np.zeros((len(classes), CLASSES, DIMENSIONS), np.float32)
    capsules[range(len(classes)), classes, 0] = 1
    return capsules


def _bands() -> NDArray[np.float32]:
    """(classes, height, width): 1 on the class's band."""
    bands = np.zeros((CLASSES, SIDE, SIDE), np.float32)
    for index in range(CLASSES):
        bands[index, band(index), 4:24] = 1
    return bands


def _encoder(channels: int) -> Sequence[onnx.NodeProto]:
    pixels = SIDE * SIDE * channels
    bands = np.repeat(_bands().reshape(CLASSES, -1), channels, axis=1)  # (classes, pixels)
    weights = (bands / bands.sum(axis=1, keepdims=True) / 255).T
    return [
        _constant("flat_shape", np.array([-1, pixels], np.int64)),
        _constant("weights", weights.astype(np.float16)),  # stored in half precision, as real exports are
        helper.make_node("Cast", ["weights"], ["weights_fp32"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["images"], ["levels"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["levels", "flat_shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights_fp32"], ["capsule_lengths"]),
        _constant("last_axis", np.array([2], np.int64)),
        helper.make_node("Unsqueeze", ["capsule_lengths", "last_axis"], ["first_dimension"]),
        _constant("padding", np.array([0, 0, 0, 0, 0, DIMENSIONS - 1], np.int64)),
        helper.make_node("Pad", ["first_dimension", "padding"], ["digit_capsules"]),
    ]


def _decoder(channels: int) -> Sequence[onnx.NodeProto]:
    bands = np.repeat(_bands().reshape(CLASSES, -1), channels, axis=1)
    shape = (-1, SIDE, SIDE) if channels == 1 else (-1, SIDE, SIDE, channels)
    return [
        _constant("classes", np.array([CLASSES], np.int64)),
        _constant("off_and_on", np.array([0, 1], np.float32)),
        helper.make_node("OneHot", ["target", "classes", "off_and_on"], ["mask"], axis=-1),
        _constant("last_axis", np.array([2], np.int64)),
        helper.make_node("ReduceSum", ["digit_capsules", "last_axis"], ["sums"], keepdims=0),
        helper.make_node("Mul", ["sums", "mask"], ["masked"]),
        _constant("bands", bands),
        helper.make_node("MatMul", ["masked", "bands"], ["light"]),
        _constant("zero", np.array(0, np.float32)),
        _constant("one", np.array(1, np.float32)),
        helper.make_node("Clip", ["light", "zero", "one"], ["clipped"]),
        _constant("image_shape", np.array(shape, np.int64)),
        helper.make_node("Reshape", ["clipped", "image_shape"], ["reconstructions"]),
    ]


def _constant(name: str, value: NDArray[np.generic]) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value, name))


def _save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
) -> Graph:
    def declare(specs: Sequence[TensorSpec]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(spec.name, _ELEMENTS[spec.datatype], ["batch", *spec.shape[1:]])
            for spec in specs
        ]

    graph = helper.make_graph(list(nodes), path.stem, declare(inputs), declare(outputs))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return Graph(
        file=path.name, sha256=sha256(path), opset=OPSET, inputs=tuple(inputs), outputs=tuple(outputs)
    )


def meanings(index: int) -> tuple[Dimension, ...]:
    """All dimensions of a class do the same, but each has a name of its own."""
    effects = {"ink": Effect(change=50, agreement=1)}
    return tuple(
        Dimension.model_validate(
            {
                "name": f"light {d} of {index}",
                "moved": 0.25,
                "effects": effects,
                "shares": {"amount of ink": 1},
            }
        )
        for d in range(DIMENSIONS)
    )


def write_tiny_model(
    models: Path,
    name: str = "tiny",
    version: str = "1",
    *,
    channels: int = 1,
    threshold: float = 4.0,
    named: bool = False,
) -> Path:
    """Write `models/name/version` and return that folder.

    Where it is `named`, the manifest says what each dimension means.
    """
    folder = models / name / version
    folder.mkdir(parents=True)
    image = ImageSpec(
        height=SIDE,
        width=SIDE,
        channels=1 if channels == 1 else 3,
        polarity="light_on_dark",
        centring="centre_of_mass" if channels == 1 else "none",
        box=20 if channels == 1 else None,
    )
    capsules = CapsuleSpec(
        primary_count=1,
        primary_dimensions=1,
        digit_dimensions=DIMENSIONS,
        routing_iterations=1,
        tweak_range=(-0.25, 0.25),
        tweak_step=0.05,
    )
    size = (SIDE, SIDE) if channels == 1 else (SIDE, SIDE, channels)
    spec_images = TensorSpec(name="images", datatype="UINT8", shape=(-1, *size))
    spec_capsules = TensorSpec(name="digit_capsules", datatype="FP32", shape=(-1, CLASSES, DIMENSIONS))
    spec_lengths = TensorSpec(name="capsule_lengths", datatype="FP32", shape=(-1, CLASSES))
    spec_target = TensorSpec(name="target", datatype="INT64", shape=(-1,))
    spec_drawn = TensorSpec(name="reconstructions", datatype="FP32", shape=(-1, *size))
    manifest = Manifest(
        name=name,
        version=version,
        created=datetime(2026, 1, 1, tzinfo=UTC),
        classes=tuple(str(index) for index in range(CLASSES)),
        image=image,
        capsules=capsules,
        encoder=_save(
            folder / "encoder.onnx", _encoder(channels), [spec_images], [spec_capsules, spec_lengths]
        ),
        decoder=_save(
            folder / "decoder.onnx", _decoder(channels), [spec_capsules, spec_target], [spec_drawn]
        ),
        calibration=Calibration(threshold=threshold, quantile=0.95, images=1, source="held-out"),
        measured=Measured(test_images=1, test_mistakes=0, parity_error=0),
        provenance=Provenance(
            code_revision="tests",
            dataset="bands",
            dataset_checksums={},
            training_images=1,
            seed=0,
            epochs=1,
            parameters=1,
            precision="fp32",
        ),
        dimensions={str(index): meanings(index) for index in range(CLASSES)} if named else {},
    )
    write_manifest(folder, manifest)
    return folder
