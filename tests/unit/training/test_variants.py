"""What is measured of an encoder in another precision."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import onnx
import pytest
import torch

from service.manifest import Graph, TensorSpec
from training import variants
from training.config import ModelConfig
from training.data import Dataset
from training.export import write_decoder
from training.graphs import encoder_graph
from training.model import CapsNet
from training.predictor import Floats, Images, Labels, OnnxPredictor
from training.variants import BATCH, images_at_a_time, measure_variants, psnr, write_variants

COUNT = BATCH + 8


def encoded(classes: list[int]) -> tuple[Floats, Floats]:
    """Of each image the capsule of its class alone is long."""
    lengths = np.eye(2, dtype=np.float32)[classes]
    return lengths[:, :, None], lengths


class Reference:
    """An encoder that finds what the first pixel says; a drawing is as bright as its class."""

    folder = Path()

    def encode(self, images: Images) -> tuple[Floats, Floats]:
        return encoded(images[:, 0, 0].tolist())

    def decode(self, capsules: Floats, target: Labels) -> Floats:
        return np.broadcast_to(target[:, None, None] / np.float32(10), (len(target), 2, 2)).astype(np.float32)


def test_mistakes_agreement_and_distance_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """All images count, the last small batch too; agreement is with fp32, mistakes are by the labels."""
    images = torch.zeros(COUNT, 2, 2, dtype=torch.uint8)
    images[:, 0, 0] = 1  # what the fp32 encoder finds
    images[-4:, 0, 1] = 1  # and what the other one does not
    labels = torch.ones(COUNT, dtype=torch.int64)
    labels[:10] = 0  # mistakes of both
    dataset = Dataset("two", ("a", "b"), images, labels, {})

    def other(images: Images) -> tuple[Floats, Floats]:
        return encoded((images[:, 0, 0] - images[:, 0, 1]).tolist())

    monkeypatch.setattr(variants, "_encoder", lambda *_: other)
    tensors = (TensorSpec(name="x", datatype="FP32", shape=(-1, 2)),)
    graph = Graph(file="encoder.int8.onnx", sha256="0" * 64, opset=20, inputs=tensors, outputs=tensors)
    (found,) = measure_variants({"int8": graph}, cast("OnnxPredictor", Reference()), dataset)
    assert found.test_mistakes == 10 + 4
    assert found.agreement == pytest.approx(100 * (COUNT - 4) / COUNT)
    # Of four images each pixel differs by a tenth.
    assert found.psnr == pytest.approx(-10 * np.log10(0.01 * 4 / COUNT), abs=1e-4)


def test_what_draws_is_measured_by_its_own_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a graph that gives reconstructions, these count and not what the fp32 decoder would draw."""
    images = torch.zeros(4, 2, 2, dtype=torch.uint8)
    dataset = Dataset("two", ("a", "b"), images, torch.zeros(4, dtype=torch.int64), {})

    def drawing(images: Images) -> tuple[Floats, ...]:
        return *encoded([0] * len(images)), np.full(images.shape, 0.1, np.float32)

    monkeypatch.setattr(variants, "_encoder", lambda *_: drawing)
    tensors = (TensorSpec(name="x", datatype="FP32", shape=(-1, 2)),)
    graph = Graph(file="encoder.fp16.onnx", sha256="0" * 64, opset=20, inputs=tensors, outputs=tensors)
    (found,) = measure_variants({"fp16": graph}, cast("OnnxPredictor", Reference()), dataset)
    assert found.psnr == pytest.approx(20)  # a tenth from the drawing of class 0, everywhere


def test_each_precision_is_computed_as_where_it_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU computes in half precision is measured rounded, and not as a CPU would compute it."""
    rounded, plain = object(), object()
    monkeypatch.setattr(variants, "RoundedGraph", lambda _: SimpleNamespace(predict=rounded))
    monkeypatch.setattr(variants, "open_graph", lambda _: plain)
    assert variants._encoder("fp16", Path()) is rounded
    assert variants._encoder("int8", Path()) is not rounded


def test_decibels() -> None:
    """A hundredth of the square is 20 dB; equal images have a large number in place of an infinite one."""
    assert psnr(0.01) == pytest.approx(20)
    assert psnr(0) == psnr(1e-300) == 200
    assert psnr(float("nan")) == psnr(float("inf")) == 0


def test_what_is_no_number_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an encoder that breaks off no image counts as agreed on, nor its drawing as good."""
    dataset = Dataset(
        "two", ("a", "b"), torch.zeros(4, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), {}
    )

    def breaking(images: Images) -> tuple[Floats, ...]:
        capsules, lengths = encoded([0] * len(images))
        lengths[-1] = np.nan
        drawn = np.zeros(images.shape, np.float32)
        drawn[-1] = np.nan
        return capsules, lengths, drawn

    monkeypatch.setattr(variants, "_encoder", lambda *_: breaking)
    tensors = (TensorSpec(name="x", datatype="FP32", shape=(-1, 2)),)
    graph = Graph(file="encoder.fp16.onnx", sha256="0" * 64, opset=20, inputs=tensors, outputs=tensors)
    (found,) = measure_variants({"fp16": graph}, cast("OnnxPredictor", Reference()), dataset)
    assert (found.test_mistakes, found.agreement, found.psnr) == (1, 75, 0)


@pytest.mark.parametrize(
    ("height", "width", "images"), [(28, 28, 32), (20, 28, 32), (56, 56, 8), (999, 999, 2)]
)
def test_fewer_of_larger_images_are_measured_at_a_time(height: int, width: int, images: int) -> None:
    """They take no more memory, and never come alone."""
    assert images_at_a_time(height, width) == images


@pytest.mark.parametrize(("height", "there"), [(40, True), (41, False)])
def test_larger_images_are_convolved_as_they_are(height: int, there: bool, tmp_path: Path) -> None:
    """Winograd's algorithm is for small ones: of large ones it takes much memory for nothing."""
    network = CapsNet(
        ModelConfig(("a", "b"), height, 40, conv_channels=2, primary_groups=1, decoder_units=(4, 4))
    ).eval()
    encoder, decoder = tmp_path / "encoder.onnx", tmp_path / "decoder.onnx"
    onnx.save(encoder_graph(network), encoder)
    write_decoder(network, decoder)
    images = torch.zeros(1, height, 40, dtype=torch.uint8)
    assert ("fp32" in write_variants(network, images, encoder, decoder)) is there
