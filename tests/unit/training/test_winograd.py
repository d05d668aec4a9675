"""The encoder for CPUs is the encoder, whichever way its second convolution goes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from training.config import ModelConfig
from training.export import round_to_half
from training.graphs import FEW, encoder_graph
from training.model import CapsNet, length
from training.winograd import DIRECT, WinogradGraph, transforms

SIZES = (DIRECT, DIRECT + 1, FEW, FEW + 1)
"""Of batches: both convolutions, with either routing or, where the matrices are shared, with one."""


def made(config: ModelConfig) -> CapsNet:
    torch.manual_seed(1)
    network = CapsNet(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)  # and logits far from zero
    round_to_half(network)
    return network


def test_three_outputs_of_five_taps() -> None:
    """Seven products give what fifteen give: (1, 2, 3, 4, 5) over (1, 0, 0, 1, 0, 0, 2)."""
    a, g, b = transforms(5)
    w, x = np.array([1, 2, 3, 4, 5]), np.array([1, 0, 0, 1, 0, 0, 2])
    np.testing.assert_allclose(a @ ((g @ w) * (b @ x)), [1 + 4, 3, 2 + 2 * 5], atol=1e-12)


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5])
def test_three_outputs_of_any_taps(taps: int) -> None:
    """As many products as there are numbers behind each other give a convolution's three outputs."""
    a, g, b = transforms(taps)
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=taps), rng.normal(size=taps + 2)
    assert a.shape == (3, taps + 2)
    np.testing.assert_allclose(a @ ((g @ w) * (b @ x)), np.correlate(x, w), atol=1e-12)


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"channels": 3},
        {"scaled_votes": True, "capsule_biases": True},
        {"shared_weights": True},
        {"routing_iterations": 1},
        {"kernel_size": 4},
        {"kernel_size": 5},
        {"kernel_size": 11},
    ],
)
@pytest.mark.parametrize(("height", "width"), [(28, 28), (27, 40), (24, 29)])
def test_it_is_the_network(switches: dict[str, object], height: int, width: int, tmp_path: Path) -> None:
    """Capsules and lengths to six digits, for whole tiles and others, and every way that a batch may go."""
    config = ModelConfig(("a", "b", "c"), height=height, width=width, conv_channels=8, primary_groups=4)
    network = made(replace(config, **switches))  # type: ignore[arg-type] # each is of its field's type
    images = torch.randint(0, 256, (max(SIZES), *network.config.image_shape), dtype=torch.uint8)
    graph = encoder_graph(network, writer=WinogradGraph)
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, tmp_path / "encoder.onnx")
    session = ort.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    for size in SIZES:
        expected = network.encoder(images[:size]).detach()
        capsules, lengths = session.run(None, {"images": images[:size].numpy()})
        np.testing.assert_allclose(capsules, expected.numpy(), atol=2e-6)
        np.testing.assert_allclose(lengths, length(expected).numpy(), atol=2e-6)


@pytest.mark.parametrize(("size", "direct"), [(DIRECT, True), (DIRECT + 1, False)])
def test_each_way_gets_its_batches(size: int, direct: bool, tmp_path: Path) -> None:
    """Up to `DIRECT` images are convolved directly, and none of more."""
    network = made(ModelConfig(("a", "b"), conv_channels=4, primary_groups=2))
    model = encoder_graph(network, writer=WinogradGraph)
    (convolution,) = (node for node in model.graph.node if node.op_type == "Conv" and len(node.attribute))
    model.graph.output.append(onnx.ValueInfoProto(name=convolution.output[0]))
    onnx.save(model, tmp_path / "encoder.onnx")
    session = ort.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    images = np.zeros((size, *network.config.image_shape), np.uint8)
    *_, directly = session.run(None, {"images": images})
    assert len(directly) == (size if direct else 0)


def test_larger_filters_have_one_way() -> None:
    """There are points for filters of up to 10x10; of 11x11 the convolution is always direct."""
    for kernel, ways in ((10, 2), (11, 1)):
        network = made(ModelConfig(("a", "b"), conv_channels=4, primary_groups=2, kernel_size=kernel))
        nodes = encoder_graph(network, writer=WinogradGraph).graph.node
        assert sum(node.op_type == "Slice" and node.input[0] == "images" for node in nodes) == 2 * (ways - 1)
