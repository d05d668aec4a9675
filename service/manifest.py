"""What an exported model says about itself: `models/<name>/<version>/manifest.json`.

The reader owns the contract: `training.export` writes these very classes, the service reads them,
and neither knows the network's shape from anywhere else.
"""

import hashlib
import json
import os
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.errors import StartError

SCHEMA_VERSION: Final = 1
MANIFEST_FILE = "manifest.json"
_LINE = 110  # characters

Datatype = Literal["UINT8", "INT64", "FP32"]
"""Element types by their Open Inference Protocol names."""

Precision = Literal["fp32", "fp16", "int8"]
"""Arithmetic of an encoder; int8 is that of its convolutions alone."""

UsedDevice = Literal["cpu", "cuda"]

Measure = Literal["thickness", "slant", "width", "height", "ink", "across", "down"]
"""What is measured on a drawing, in pixels; slant in degrees, growing to the right; ink in per cent of what
the untweaked drawing has; `across` and `down` are where the ink's centre of mass lies."""


# What a variant may differ by from fp32 to be chosen without being asked for.
MOST_ERROR = 0.02  # per cent of the test images
LEAST_AGREEMENT = 99.9  # per cent of the test images
LEAST_PSNR = 40  # dB; 1 % of the brightest pixel


class ManifestError(Exception):
    """A model folder that cannot be served; the message names the file and the reason."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TensorSpec(_Record):
    """One graph input or output in the Open Inference Protocol's form; -1 is the free batch axis."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]


class Graph(_Record):
    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.onnx$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    opset: Annotated[int, Field(ge=1)]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class ImageSpec(_Record):
    """How the network expects an image.

    `polarity` is the ink's side of the grey scale. `centring` says how the training images were
    laid out: `centre_of_mass` is MNIST's way (ink in a `box` pixels square, placed by its centre of
    mass), `none` leaves images as they are.
    """

    height: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]
    channels: Literal[1, 3]
    polarity: Literal["light_on_dark", "dark_on_light"]
    centring: Literal["centre_of_mass", "none"]
    box: Annotated[int, Field(ge=1)] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W) for grey, (H, W, 3) for colour."""
        size = (self.height, self.width)
        return size if self.channels == 1 else (*size, self.channels)

    @model_validator(mode="after")
    def _box_where_centred(self) -> "ImageSpec":
        if self.centring == "none":
            if self.box is not None:
                raise ValueError("a box belongs to centring centre_of_mass")
        elif self.box is None or self.box > min(self.height, self.width) or self.channels != 1:
            raise ValueError("centring centre_of_mass takes a grey image and a box that fits into it")
        return self


class CapsuleSpec(_Record):
    primary_count: Annotated[int, Field(ge=1)]
    primary_dimensions: Annotated[int, Field(ge=1)]
    digit_dimensions: Annotated[int, Field(ge=1)]
    routing_iterations: Annotated[int, Field(ge=1)]
    tweak_range: tuple[float, float]
    """Smallest and largest tweak of one dimension that the figures use; the paper's is -0.25 … 0.25."""
    tweak_step: Annotated[float, Field(gt=0)]


def margins(lengths: NDArray[np.float32]) -> NDArray[np.float32]:
    """How much longer the longest capsule is than the next, (N,), by the lengths (N, classes)."""
    second, first = np.partition(lengths, -2, axis=-1)[:, -2:].T
    return first - second  # type: ignore[no-any-return] # NumPy's subtraction


class Calibration(_Record):
    """What is usual for an image of one of the classes: `quantile` of `images` are within both bounds."""

    threshold: Annotated[float, Field(gt=0)]
    """Largest summed squared reconstruction error."""
    margin: Annotated[float, Field(ge=0, le=1)] = 0
    """Least difference between the longest capsule's length and the next one's."""
    quantile: Annotated[float, Field(gt=0, lt=1)]
    images: Annotated[int, Field(ge=1)]
    source: Literal["held-out", "training"]
    """`training` where the network may have learned from them: in its run, or behind its first weights."""

    def usual(self, errors: NDArray[np.float32], lengths: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Which images are within both, by reconstruction error (N,) and capsule lengths (N, classes)."""
        return (errors <= self.threshold) & (margins(lengths) >= self.margin)


class Measured(_Record):
    """Figures of the exported graphs themselves, on the dataset's test images."""

    test_images: Annotated[int, Field(ge=0)]
    test_mistakes: Annotated[int, Field(ge=0)]
    parity_error: Annotated[float, Field(ge=0)]
    """Largest absolute difference between ONNX Runtime and PyTorch over all outputs."""
    beyond_threshold: dict[str, Annotated[float, Field(ge=0, le=100)]] = {}
    """Share of images, in per cent, beyond either calibrated bound: of `test` images, wrongly; of
    images that are of no class, by their kind, rightly."""

    @property
    def test_error(self) -> float:
        """Share of misclassified test images, in per cent."""
        return 100 * self.test_mistakes / self.test_images


class Start(_Record):
    source: str
    """`<name>/<version>` of a model, or what run they are of."""
    sha256: str
    """Of the file that the encoder's weights were read from."""
    epochs: Annotated[int, Field(ge=0)]
    """Passes over the training images behind these weights, in all."""


class Variant(_Record):
    """The encoder in another precision or, in fp32, as it is fastest on a CPU, and what it cost on the test
    images."""

    precision: Precision
    encoder: Graph
    """With the decoder's output too if it draws the longest capsule itself."""
    test_mistakes: Annotated[int, Field(ge=0)]
    agreement: Annotated[float, Field(ge=0, le=100)]
    """Share of test images, in per cent, that it puts into the same class as fp32."""
    psnr: float
    """Of its reconstructions against those from the fp32 encoder, in dB."""


class Provenance(_Record):
    code_revision: str
    dataset: str
    dataset_checksums: dict[str, str]
    training_images: Annotated[int, Field(ge=1)]
    seed: int
    epochs: Annotated[int, Field(ge=1)]
    start: Start | None = None
    """The weights that training began with; none if they were random."""
    parameters: Annotated[int, Field(ge=1)]
    precision: str
    """Arithmetic of the training run: `fp32` or `bf16`."""

    @property
    def epochs_in_all(self) -> int:
        """Epochs of training, those behind the first weights included."""
        return self.epochs + (self.start.epochs if self.start else 0)


class Effect(_Record):
    """How a measure of the drawing changes while a dimension goes through the tweak range, upwards."""

    change: float
    """Mean over images."""
    agreement: Annotated[float, Field(ge=0, le=1)]
    """Share of the images in which it goes the same way."""


class Dimension(_Record):
    """What one dimension of one class's capsule means, by the drawings along the tweak range."""

    name: Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,120}$")]
    """In words, by what accounts for the largest share of the change."""
    moved: Annotated[float, Field(ge=0)]
    """Squared change between the ends of the range, as a share of the untweaked drawing's squared light."""
    effects: dict[Measure, Effect]
    """Those that go the same way in nearly all images."""
    shares: dict[str, Annotated[float, Field(ge=0, le=1)]]
    """Share of the squared change that a pure change of each kind would account for, alone, largest first;
    of a part of the drawing, what falls there of the rest that all such changes together leave."""


Dimensions = dict[str, tuple[Dimension, ...]]
"""By class, in the order of the capsule's dimensions."""


class Manifest(_Record):
    schema_version: Literal[1] = SCHEMA_VERSION
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    version: Annotated[str, Field(pattern=r"^[1-9][0-9]*$")]
    created: datetime
    architecture: Literal["capsnet", "efficient-capsnet"] = "capsnet"
    """`efficient-capsnet` routes by self-attention, in a single pass."""
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    labels_per_image: Annotated[int, Field(ge=1)] = 1
    """How many classes the images that it learned from show; the prediction is as many longest capsules."""
    image: ImageSpec
    capsules: CapsuleSpec
    encoder: Graph
    decoder: Graph
    variants: tuple[Variant, ...] = ()
    calibration: Calibration
    measured: Measured
    provenance: Provenance
    dimensions: Dimensions = {}
    """What they mean; of the classes for which that was measured."""

    @model_validator(mode="after")
    def _distinct_classes(self) -> "Manifest":
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("class labels must differ from one another")
        return self

    @model_validator(mode="after")
    def _distinct_precisions(self) -> "Manifest":
        if len({variant.precision for variant in self.variants}) != len(self.variants):
            raise ValueError("variants must differ in precision")
        return self

    @model_validator(mode="after")
    def _dimensions_of_these_capsules(self) -> "Manifest":
        count = self.capsules.digit_dimensions
        for label, dimensions in self.dimensions.items():
            if label not in self.classes or len(dimensions) != count:
                raise ValueError(
                    f"dimensions has {len(dimensions)} for {label!r}, expected {count} for each class"
                )
        return self

    @property
    def reference(self) -> str:
        """The model and its version, as requests name them."""
        return f"{self.name}/{self.version}"

    def encoders(self, device: UsedDevice) -> dict[Precision, Graph]:
        """The encoder's graph in each precision that there is, fp32 first.

        In fp32 the one for CPUs, on a CPU, if there is one and nobody would tell it from the other.
        """
        encoders: dict[Precision, Graph] = {"fp32": self.encoder}
        for variant in self.variants:
            if variant.precision != "fp32" or (device == "cpu" and self.as_good(variant)):
                encoders[variant.precision] = variant.encoder
        return encoders

    def as_good(self, variant: Variant) -> bool:
        """Whether nobody would tell the variant from fp32: what may be chosen without being asked for."""
        more_mistakes = 100 * (variant.test_mistakes - self.measured.test_mistakes)
        return (
            more_mistakes <= MOST_ERROR * self.measured.test_images
            and variant.agreement >= LEAST_AGREEMENT
            and variant.psnr >= LEAST_PSNR
        )

    def dimension_names(self, label: str) -> tuple[str, ...]:
        """What the dimensions of a class's capsule mean, in words; none if that was not measured."""
        return tuple(dimension.name for dimension in self.dimensions.get(label, ()))

    @property
    def capsule_shape(self) -> tuple[int, int]:
        """(classes, dimensions) of one image's digit capsules."""
        return len(self.classes), self.capsules.digit_dimensions

    def encoder_tensors(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """The inputs and outputs that an encoder of this shape must have."""
        classes, dimensions = self.capsule_shape
        return (
            (TensorSpec(name="images", datatype="UINT8", shape=(-1, *self.image.shape)),),
            (
                TensorSpec(name="digit_capsules", datatype="FP32", shape=(-1, classes, dimensions)),
                TensorSpec(name="capsule_lengths", datatype="FP32", shape=(-1, classes)),
            ),
        )

    def variant_tensors(self, variant: Variant) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """The same of a variant's, which may draw as well, but in fp32: who takes it may get the encoder."""
        inputs, outputs = self.encoder_tensors()
        drawn = draws(variant.encoder) and variant.precision != "fp32"
        return inputs, outputs + (self.decoder_tensors()[1] if drawn else ())

    def decoder_tensors(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """The inputs and outputs that a decoder of this shape must have."""
        return (
            (
                TensorSpec(name="digit_capsules", datatype="FP32", shape=(-1, *self.capsule_shape)),
                TensorSpec(name="target", datatype="INT64", shape=(-1,)),
            ),
            (TensorSpec(name="reconstructions", datatype="FP32", shape=(-1, *self.image.shape)),),
        )


def draws(encoder: Graph) -> bool:
    """Whether an encoder's graph gives reconstructions too, from the longest capsule of each image."""
    return any(output.name == "reconstructions" for output in encoder.outputs)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def version_folders(models: Path) -> list[Path]:
    """Every `<name>/<version>` folder; hidden ones are of exports that have not ended."""

    def names_a_model(name: str) -> bool:
        return not name.startswith(".") and name.isprintable()  # bytes that are no UTF-8 are not

    return sorted(
        path
        for path in models.glob("*/*")
        if path.is_dir() and path.name.isdecimal() and names_a_model(path.parent.name)
    )


def model_folders(models: Path) -> list[Path]:
    """Every `<name>/<version>` folder.

    Raises:
        StartError: there is none.
    """
    folders = version_folders(models)
    if not folders:
        raise StartError(
            f"{models.resolve()}: holds no model; expected <name>/<version>/{MANIFEST_FILE} as "
            "`capsnet export` writes it (set CAPSNET_MODELS to use another folder)"
        )
    return folders


def manifest_checksum(folder: Path) -> str:
    """Hex digest of a folder's manifest, and so of its model: the manifest has every graph's own.

    Raises:
        ManifestError: it cannot be read.
    """
    return hashlib.sha256(_text(folder)).hexdigest()


def require_manifest(folder: Path, checksum: str) -> None:
    """Check that a folder's manifest is the one with this checksum.

    Raises:
        ManifestError: it is another, or gone.
    """
    try:
        same = manifest_checksum(folder) == checksum
    except ManifestError:
        same = False
    if not same:
        raise ManifestError(
            f"{folder / MANIFEST_FILE}: was changed or removed since the start; put back what it was, which "
            "is still served, or start the service again"
        )


def _text(folder: Path) -> bytes:
    path = folder / MANIFEST_FILE
    try:
        return path.read_bytes()
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror}); export the model again") from error


def read_manifest(folder: Path) -> Manifest:
    """Read and verify a model folder: schema, folder names, tensors, and every graph's checksum.

    Raises:
        ManifestError: naming the file at fault, what was found and what was expected.
    """
    path = folder / MANIFEST_FILE
    text = _text(folder)
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "document"
        raise ManifestError(
            f"{path}: {where}: {first['msg']} (found {str(first['input'])[:80]!r}); "
            f"this service reads schema_version {SCHEMA_VERSION}"
        ) from error
    _require(path, "version", manifest.version, folder.name)
    _require(path, "name", manifest.name, folder.parent.name)
    for role, graph, (inputs, outputs) in (
        ("encoder", manifest.encoder, manifest.encoder_tensors()),
        ("decoder", manifest.decoder, manifest.decoder_tensors()),
        *(
            (f"{variant.precision} encoder", variant.encoder, manifest.variant_tensors(variant))
            for variant in manifest.variants
        ),
    ):
        _require(path, f"{role}.inputs", graph.inputs, inputs)
        _require(path, f"{role}.outputs", graph.outputs, outputs)
        file = folder / graph.file
        if not file.is_file():
            raise ManifestError(f"{file}: missing, but {path} names it as the {role}")
        check_content(file, graph)
    return manifest


def check_content(path: Path, graph: Graph) -> None:
    """Check that a file is the one that the manifest describes.

    Raises:
        ManifestError: it is another, or cannot be read.
    """
    try:
        found = sha256(path)
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror})") from error
    _require(path, "sha256", found, graph.sha256)


def _require(path: Path, field: str, found: object, expected: object) -> None:
    if found != expected:
        raise ManifestError(f"{path}: {field} is {found!r}, expected {expected!r}")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into `folder` in one step, so that a reader sees all of it or none."""
    path = folder / MANIFEST_FILE
    partial = path.with_suffix(".partial")
    partial.write_text(_lay_out(manifest.model_dump(mode="json")) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _lay_out(value: Any, indent: str = "") -> str:
    """JSON in which what fits into one line stays on it."""
    line = json.dumps(value, ensure_ascii=False)
    if len(indent) + len(line) <= _LINE or not isinstance(value, dict | list):
        return line
    inner = indent + "  "
    if isinstance(value, dict):
        rows = [
            f"{json.dumps(key, ensure_ascii=False)}: {_lay_out(item, inner)}" for key, item in value.items()
        ]
        brackets = "{}"
    else:
        rows = [_lay_out(item, inner) for item in value]
        brackets = "[]"
    return brackets[0] + ",".join(f"\n{inner}{row}" for row in rows) + f"\n{indent}{brackets[1]}"
