"""The graphs that come with the repository against PyTorch, with the weights that are in their files."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from service.engine import Way, bring_together, load_graphs
from service.manifest import Manifest, ManifestError, Precision, read_manifest
from service.sessions import choose_precision, open_session
from service.settings import Settings
from tests.support.mnist import ROOT, mnist_test_images
from training.config import ModelConfig
from training.data import Dataset
from training.model import CapsNet
from training.model_card import AUTHORS, REMARKS, meaning
from training.predictor import OnnxPredictor, TorchPredictor

VERSIONS = sorted(path.parent for path in (ROOT / "models").glob("mnist/*/manifest.json"))
MAPPED = Path("/proc/self/maps")
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


@pytest.mark.parametrize("way", ["padded", "bound"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_padding_and_buffers_change_no_answer(
    folder: Path, precision: Precision, way: Way, mnist: Dataset
) -> None:
    """In every batch size an image is answered as by a plain run of its own batch, and drawn as well."""
    most = 9
    manifest = read_manifest(folder)
    chosen = manifest.encoders("cuda")[precision]
    encoder, decoder = (
        open_session(folder / graph.file, graph, device="cpu", threads=1)
        for graph in (chosen, manifest.decoder)
    )
    one_by_one = bring_together(manifest, precision, chosen, encoder, decoder, (most, most), "plain")
    graphs = bring_together(manifest, precision, chosen, encoder, decoder, (most, most), way)
    for size in range(1, most + 1):
        inputs = mnist.images[most : most + size].numpy(), np.ones(size, np.bool_)
        for found, expected in zip(graphs.predict(inputs), one_by_one.predict(inputs), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_the_graph_for_cpus_is_the_encoder(folder: Path, mnist: Dataset) -> None:
    """In fp32 a CPU is served by another graph, whose capsules and lengths are those of `encoder.onnx`."""
    manifest = read_manifest(folder)
    graph = manifest.encoders("cpu")["fp32"]
    assert graph.file != manifest.encoder.file
    found = open_session(folder / graph.file, graph, device="cpu", threads=1)
    expected = open_session(folder / manifest.encoder.file, manifest.encoder, device="cpu", threads=1)
    for size in range(1, 9):
        images = mnist.images[:size].numpy()
        for one, other in zip(found.run(images), expected.run(images), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_the_graph_for_gpus_draws_as_the_decoder_does(folder: Path, mnist: Dataset) -> None:
    """Reconstructions of the fp16 graph are those of the decoder's, from the longest of the same capsules."""
    manifest = read_manifest(folder)
    graph = manifest.encoders("cuda")["fp16"]
    images = mnist.images[:20].numpy()
    capsules, lengths, drawn = open_session(folder / graph.file, graph, device="cpu", threads=1).run(images)
    expected = OnnxPredictor(folder).decode(capsules, lengths.argmax(axis=1))
    np.testing.assert_allclose(drawn, expected, atol=1e-5)


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
@pytest.mark.skipif(not MAPPED.exists(), reason="only Linux tells which files a process has in its memory")
def test_nothing_of_a_folder_is_needed_once_it_is_loaded(folder: Path) -> None:
    """A session reads none of its model's files later on, whatever becomes of them."""
    manifest = read_manifest(folder)
    graphs = (manifest.encoder, manifest.decoder, *(variant.encoder for variant in manifest.variants))
    sessions = [open_session(folder / graph.file, graph, device="cpu", threads=1) for graph in graphs]
    assert len(sessions) == 5
    assert str(folder) not in MAPPED.read_text()


@pytest.mark.parametrize(("precision", "file"), [("fp32", "encoder.onnx"), ("int8", "encoder.onnx")])
def test_weights_that_change_while_they_are_loaded_are_refused(
    precision: Precision, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph reads some of its weights in another graph's file, which has to be the manifest's as well."""
    folder = tmp_path / "mnist" / "3"
    shutil.copytree(ROOT / "models" / "mnist" / "3", folder)
    settings = Settings(models=tmp_path, device="cpu", precision=precision)

    def choose(*arguments: Any) -> Precision:
        (folder / file).write_bytes(bytes((folder / file).stat().st_size))
        return choose_precision(*arguments)

    monkeypatch.setattr("service.engine.choose_precision", choose)
    with pytest.raises(ManifestError, match=f"{file}: sha256 is"):
        load_graphs(folder, settings)


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
        assert f"| the encoder in {variant.precision}{REMARKS.get(variant.precision, '')} |" in card
