"""The Winograd form of the second convolution is the convolution, for grids of any number of tiles."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from benchmarks.winograd import transforms, winograd_encoder
from training.config import ModelConfig
from training.export import round_to_half
from training.graphs import encoder_graph
from training.model import CapsNet


def test_three_outputs_of_five_taps() -> None:
    """Seven products give what fifteen give: (1, 2, 3, 4, 5) over (1, 0, 0, 1, 0, 0, 2)."""
    a, g, b = transforms()
    w, x = np.array([1, 2, 3, 4, 5]), np.array([1, 0, 0, 1, 0, 0, 2])
    np.testing.assert_allclose(a @ ((g @ w) * (b @ x)), [1 + 4, 3, 2 + 2 * 5], atol=1e-12)


@pytest.mark.parametrize("switches", [{}, {"channels": 3}, {"scaled_votes": True, "capsule_biases": True}])
@pytest.mark.parametrize(("height", "width"), [(28, 28), (27, 40)])
def test_it_agrees_with_the_direct_form(
    switches: dict[str, object], height: int, width: int, tmp_path: Path
) -> None:
    """Capsules and lengths to six digits, for 2x2 and for 2x4 tiles, whatever the batch size."""
    torch.manual_seed(1)
    config = ModelConfig(("a", "b", "c"), height=height, width=width, conv_channels=8, primary_groups=4)
    network = CapsNet(replace(config, **switches))  # type: ignore[arg-type] # each is of its field's type
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    round_to_half(network)
    images = np.random.default_rng(0).integers(0, 256, (3, *network.config.image_shape), np.uint8)
    sessions = []
    for name, graph in (("direct", encoder_graph(network)), ("winograd", winograd_encoder(network))):
        onnx.checker.check_model(graph, full_check=True)
        onnx.save(graph, tmp_path / name)
        sessions.append(ort.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"]))
    for size in (1, 3):
        expected, found = (session.run(None, {"images": images[:size]}) for session in sessions)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-6)
