"""The graphs that come with the repository against PyTorch, with the weights that are in their files."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from service.binding import BoundSession, fetched
from service.manifest import Manifest, Precision, read_manifest
from service.sessions import open_session
from tests.support.mnist import ROOT, mnist_test_images
from training.config import ModelConfig
from training.data import Dataset
from training.model import CapsNet
from training.model_card import AUTHORS, COMPUTED, meaning
from training.predictor import OnnxPredictor, TorchPredictor

VERSIONS = sorted(path.parent for path in (ROOT / "models").glob("mnist/*/manifest.json"))
CARDS = sorted(path.parent for path in (ROOT / "models").glob("*/*/MODEL_CARD.md"))


@pytest.fixture(scope="module")
def mnist() -> Dataset:
    return mnist_test_images()


def network(folder: Path, manifest: Manifest) -> CapsNet:
    """The PyTorch network, rebuilt from nothing but the model folder."""
    config = ModelConfig(classes=manifest.classes, routing_iterations=manifest.capsules.routing_iterations)
    rebuilt = CapsNet(config).eval()
    weights = {}
    for prefix, graph in (("", manifest.encoder), ("decoder.", manifest.decoder)):
        for tensor in onnx.load(folder / graph.file).graph.initializer:
            name = prefix + tensor.name.removesuffix(".half")
            weights[name] = torch.from_numpy(numpy_helper.to_array(tensor).copy()).float()
    rebuilt.load_state_dict({name: weights[name] for name in rebuilt.state_dict()})
    return rebuilt


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_onnx_runtime_agrees_with_pytorch(folder: Path, mnist: Dataset) -> None:
    """Capsules, lengths and reconstructions agree to 1e-4 at batch sizes 1, 2, 7 and 64."""
    exported = OnnxPredictor(folder)
    reference = TorchPredictor(network(folder, exported.manifest))
    for size in (1, 2, 7, 64):
        images = mnist.images[:size].numpy()  # 7, 2, 1, 0, 4, 1, 4, …: winners differ
        capsules, lengths = exported.encode(images)
        expected_capsules, expected_lengths = reference.encode(images)
        np.testing.assert_allclose(capsules, expected_capsules, atol=1e-4)
        np.testing.assert_allclose(lengths, expected_lengths, atol=1e-4)
        longest = expected_lengths.argmax(axis=-1)
        assert size == 1 or len(set(longest.tolist())) > 1
        np.testing.assert_allclose(
            exported.decode(capsules, longest), reference.decode(expected_capsules, longest), atol=1e-4
        )


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_bound_buffers_change_no_answer(folder: Path, precision: Precision, mnist: Dataset) -> None:
    """In every batch size, padded or not, an image is answered as by a plain run of its own batch."""
    most = 9
    manifest = read_manifest(folder)
    encoder, decoder = manifest.encoders[precision], manifest.decoder
    plain, draws = (
        open_session(folder / graph.file, graph, device="cpu", threads=1) for graph in (encoder, decoder)
    )
    bound = BoundSession(plain, encoder, [most])
    drawer = BoundSession(draws, decoder, [most], upstream=bound)
    for size in range(1, most + 1):
        images = mnist.images[most : most + size].numpy()
        capsules, lengths = plain.run(images)
        held, found = bound.run(images)
        index = fetched(found).argmax(axis=1)
        np.testing.assert_allclose(fetched(held), capsules, atol=1e-5)
        np.testing.assert_allclose(fetched(found), lengths, atol=1e-5)
        np.testing.assert_allclose(
            fetched(*drawer.run(held, index)), draws.run(capsules, index)[0], atol=1e-5
        )


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_the_card_states_the_manifests_error(folder: Path) -> None:
    """The model card and the manifest name the same number of mistakes."""
    measured = read_manifest(folder).measured
    card = (folder / "MODEL_CARD.md").read_text()
    assert f"{measured.test_error:.2f} % ({measured.test_mistakes} of {measured.test_images})" in card


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_the_card_names_the_manifests_dimensions(folder: Path) -> None:
    """Every dimension of every class has a name, and the card gives the same ones."""
    manifest = read_manifest(folder)
    assert tuple(manifest.dimensions) == manifest.classes
    assert meaning(manifest) in (folder / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.parent.name)
def test_a_card_says_whose_network_it_is_and_what_computed_it(folder: Path) -> None:
    """A card names the authors of its own architecture, and what stood in for a GPU."""
    manifest, card = read_manifest(folder), (folder / "MODEL_CARD.md").read_text()
    assert f"A capsule network after {AUTHORS[manifest.architecture]}.\n" in card
    for variant in manifest.variants:
        assert f"| the encoder in {variant.precision}{COMPUTED.get(variant.precision, '')} |" in card
