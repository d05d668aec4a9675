"""A model folder is served whole and unaltered, or refused with the file and the reason."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from service.manifest import (
    MANIFEST_FILE,
    Calibration,
    ImageSpec,
    ManifestError,
    Variant,
    draws,
    margins,
    read_manifest,
    version_folders,
    write_manifest,
)


@pytest.fixture
def folder(tiny_models: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_models / "tiny" / "1", tmp_path / "tiny" / "1"))


def change(folder: Path, *place: str | int, value: Any) -> None:
    path = folder / MANIFEST_FILE
    document = json.loads(path.read_text())
    inner = document
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    path.write_text(json.dumps(document))


def test_what_is_written_is_what_is_read(folder: Path) -> None:
    """A manifest survives writing and reading, and no partial file stays."""
    manifest = read_manifest(folder)
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest
    assert {path.name for path in folder.iterdir()} == {"encoder.onnx", "decoder.onnx", MANIFEST_FILE}


def test_a_full_disk_leaves_the_old_manifest(folder: Path) -> None:
    """What cannot be written to its end takes nothing away from what was there."""
    before = read_manifest(folder)
    (folder / MANIFEST_FILE).with_suffix(".partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_manifest(folder, before)
    assert read_manifest(folder) == before


def test_a_missing_manifest_is_named(folder: Path) -> None:
    """A folder without a manifest is an error that names the file."""
    (folder / MANIFEST_FILE).unlink()
    with pytest.raises(ManifestError, match=r"manifest\.json: cannot be read"):
        read_manifest(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema_version": 1}'])
def test_a_broken_manifest_is_named(folder: Path, text: str) -> None:
    """What is not a manifest is an error that names the file."""
    (folder / MANIFEST_FILE).write_text(text)
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("schema_version",), 2, "schema_version"),
        (("surprise",), 1, "surprise"),
        (("version",), "2", "version is '2', expected '1'"),
        (("name",), "other", "name is 'other', expected 'tiny'"),
        (("version",), "latest", "version"),
        (("version",), "01", "should match pattern"),
        (("classes",), ["0"] * 10, "class labels must differ"),
        (("classes",), ["a", "b"], "encoder.outputs"),
        (("image", "height"), 27, "encoder.inputs"),
        (("image", "box"), 29, "image"),
        (("image", "centring"), "none", "image"),
        (("capsules", "digit_dimensions"), 8, "encoder.outputs"),
        (("encoder", "file"), "../encoder.onnx", "encoder.file"),
        (("encoder", "file"), "absent.onnx", "absent.onnx: missing"),
        (("decoder", "sha256"), "0" * 64, "decoder.onnx: sha256"),
        (
            (
                "decoder",
                "outputs",
            ),
            [],
            "decoder.outputs",
        ),
        (("calibration", "threshold"), 0, "calibration.threshold"),
    ],
)
def test_a_field_that_is_wrong_is_named(folder: Path, place: tuple[str, ...], value: Any, named: str) -> None:
    """Whatever in the manifest does not fit the folder or itself is named."""
    change(folder, *place, value=value)
    with pytest.raises(ManifestError) as refused:
        read_manifest(folder)
    assert named in str(refused.value)


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("psnr",), float("inf"), "variants.0.psnr"),
        (("encoder", "outputs"), [], "int8 encoder.outputs"),
        (("encoder", "sha256"), "0" * 64, "encoder.onnx: sha256"),
    ],
)
def test_a_variant_is_checked_as_the_encoder_is(
    folder: Path, place: tuple[str, ...], value: Any, named: str
) -> None:
    """Another file or form than the manifest tells, and a figure that is no number, are refused."""
    encoder = read_manifest(folder).encoder.model_dump()
    variant = {"precision": "int8", "encoder": encoder, "test_mistakes": 0, "agreement": 100, "psnr": 50}
    change(folder, "variants", value=[variant])
    read_manifest(folder)
    change(folder, "variants", 0, *place, value=value)
    with pytest.raises(ManifestError) as refused:
        read_manifest(folder)
    assert named in str(refused.value)


def test_a_variant_may_draw_and_the_encoder_may_not(folder: Path) -> None:
    """A variant may have the decoder's output behind the encoder's, just as it is there; not so in fp32."""
    manifest = read_manifest(folder)
    encoder, decoder = manifest.encoder.model_dump(), manifest.decoder.model_dump()
    drawing = {**encoder, "outputs": [*encoder["outputs"], *decoder["outputs"]]}
    variant = {"precision": "fp16", "encoder": drawing, "test_mistakes": 0, "agreement": 100, "psnr": 50}
    change(folder, "variants", value=[variant])
    assert draws(read_manifest(folder).encoders("cuda")["fp16"])
    assert not draws(manifest.encoder)
    change(folder, "variants", 0, "encoder", "outputs", 2, "shape", value=[-1, 27, 28])
    with pytest.raises(ManifestError, match=r"fp16 encoder\.outputs"):
        read_manifest(folder)
    change(folder, "variants", value=[variant | {"precision": "fp32"}])
    with pytest.raises(ManifestError, match=r"fp32 encoder\.outputs"):
        read_manifest(folder)
    change(folder, "variants", value=[])
    change(folder, "encoder", "outputs", value=drawing["outputs"])
    with pytest.raises(ManifestError, match=r"encoder\.outputs"):
        read_manifest(folder)


def test_each_precision_has_one_variant(folder: Path) -> None:
    """Two encoders of one precision are refused."""
    encoder = read_manifest(folder).encoder.model_dump()
    variant = {"precision": "int8", "encoder": encoder, "test_mistakes": 0, "agreement": 100, "psnr": 50}
    change(folder, "variants", value=[variant] * 2)
    with pytest.raises(ManifestError, match="variants must differ in precision"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("mistakes", "agreement", "psnr", "good"),
    [(31, 99.9, 40, True), (32, 99.9, 40, False), (31, 99.89, 40, False), (31, 99.9, 39.9, False)],
)
def test_what_is_as_good_as_fp32(
    folder: Path, mistakes: int, agreement: float, psnr: float, good: bool
) -> None:
    """Of 10,000 images two more mistaken, 10 classed otherwise, and 40 dB are the most that passes."""
    manifest = read_manifest(folder)
    measured = manifest.measured.model_copy(update={"test_images": 10_000, "test_mistakes": 29})
    variant = Variant(
        precision="int8", encoder=manifest.encoder, test_mistakes=mistakes, agreement=agreement, psnr=psnr
    )
    assert manifest.model_copy(update={"measured": measured}).as_good(variant) is good


@pytest.mark.parametrize("wrong", [{"box": 21}, {"channels": 3}])
def test_only_what_can_be_centred_is(wrong: dict[str, int]) -> None:
    """The box fits into the shorter side, and the image is grey."""
    spec = {"height": 20, "width": 28, "channels": 1, "polarity": "light_on_dark", "box": 20}
    ImageSpec.model_validate({**spec, "centring": "centre_of_mass"})
    with pytest.raises(ValidationError, match="a grey image and a box that fits"):
        ImageSpec.model_validate({**spec, "centring": "centre_of_mass", **wrong})


def test_versions_are_numbers(tmp_path: Path) -> None:
    """Folders beside them are none, nor is what an export has not finished, for a model that is called 7."""
    unwritable = os.fsdecode(b"b\xff/1")  # which could be told to nobody
    for name in ("mnist/2", "mnist/latest", "mnist/10", ".export-x/7", unwritable):
        (tmp_path / name).mkdir(parents=True)
    assert version_folders(tmp_path) == [tmp_path / "mnist/10", tmp_path / "mnist/2"]


def test_a_manifest_without_dimensions_has_no_names(folder: Path) -> None:
    """Models that were exported before dimensions were named are read, and name none."""
    document = json.loads((folder / MANIFEST_FILE).read_text())
    del document["dimensions"]
    (folder / MANIFEST_FILE).write_text(json.dumps(document))
    assert read_manifest(folder).dimension_names("3") == ()


def test_dimensions_have_names(tiny_models: Path) -> None:
    """A class's names stand in the order of its capsule's dimensions."""
    manifest = read_manifest(tiny_models / "tiny" / "2")
    assert manifest.dimension_names("3") == tuple(f"light {d} of 3" for d in range(16))


@pytest.mark.parametrize(
    ("label", "count", "name", "named"),
    [
        ("3", 15, "slant", "dimensions has 15 for '3', expected 16"),
        ("ten", 16, "slant", "dimensions has 16 for 'ten'"),
        ("3", 16, "", "dimensions.3.0.name"),
        ("3", 16, "two\nlines", "dimensions.3.0.name"),
    ],
)
def test_dimensions_are_those_of_the_capsules(
    folder: Path, label: str, count: int, name: str, named: str
) -> None:
    """Every dimension of a known class has a name that fits into a line."""
    dimension = {"name": name, "moved": 0, "effects": {}, "shares": {}}
    change(folder, "dimensions", value={label: [dimension] * count})
    with pytest.raises(ManifestError) as refused:
        read_manifest(folder)
    assert named in str(refused.value)


def test_what_fits_into_a_line_stays_on_it(tiny_models: Path) -> None:
    """People read manifests: a list of classes takes one line, and no line is too long to see."""
    lines = (tiny_models / "tiny" / "2" / MANIFEST_FILE).read_text().splitlines()
    assert '  "classes": ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"],' in lines
    assert lines.count('        "effects": {"ink": {"change": 50.0, "agreement": 1.0}},') == 10 * 16
    assert max(map(len, lines)) <= 110


def test_an_altered_graph_is_named(folder: Path) -> None:
    """One flipped bit in a graph is found by its checksum."""
    path = folder / "encoder.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ManifestError, match=r"encoder\.onnx: sha256"):
        read_manifest(folder)


def test_margins() -> None:
    """The margin is the longest length less the next, wherever the two stand, and 0 for a tie."""
    lengths = np.array([[0.1, 0.9, 0.6, 0.2], [0.9, 0.5, 0.2, 0.1], [0.5, 0.5, 0.1, 0.2]], np.float32)
    np.testing.assert_allclose(margins(lengths), [0.3, 0.4, 0], atol=1e-6)


def test_usual_is_within_both_bounds() -> None:
    """An image is usual up to the error and from the margin of the calibration, both included."""
    calibration = Calibration(threshold=4, margin=0.25, quantile=0.95, images=1, source="held-out")
    errors = np.array([4, 4.1, 4, 4], np.float32)
    lengths = np.array([[0.5, 0.75], [0.5, 0.75], [0.5, 0.7], [0.75, 0.5]], np.float32)
    assert calibration.usual(errors, lengths).tolist() == [True, False, False, True]


def test_a_manifest_without_a_margin_asks_for_none(folder: Path) -> None:
    """Models that were exported before there was a margin are judged by the error alone."""
    document = json.loads((folder / MANIFEST_FILE).read_text())
    document["calibration"].pop("margin", None)
    (folder / MANIFEST_FILE).write_text(json.dumps(document))
    calibration = read_manifest(folder).calibration
    assert calibration.usual(np.zeros(1, np.float32), np.full((1, 2), 0.5, np.float32)).tolist() == [True]
