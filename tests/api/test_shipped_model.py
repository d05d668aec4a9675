"""The model that comes with the repository, through the real HTTP contract."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from starlette.testclient import TestClient

from service.app import create_app
from service.manifest import read_manifest
from service.settings import Settings
from tests.support.encoded import encode, npy
from tests.support.mnist import ROOT, mnist_test_images
from training.data import Dataset

MODELS = ROOT / "models"
VERSIONS = sorted(path.parent for path in MODELS.glob("*/*/manifest.json"))
NPY = {"content-type": "application/x-npy"}


@pytest.fixture(scope="module")
def mnist() -> Dataset:
    return mnist_test_images()


@pytest.fixture(scope="module", params=["auto", "fp32"])
def client(request: pytest.FixtureRequest) -> Iterator[TestClient]:
    settings = Settings(models=MODELS, device="cpu", default_model="mnist", precision=request.param)
    with TestClient(create_app(settings)) as started:
        yield started


def test_there_is_a_model_and_it_is_small() -> None:
    """A clone brings a trained model, and all models together stay under 25 MiB."""
    assert VERSIONS
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) < 25 * 2**20


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_error_is_what_the_manifest_states(folder: Path, client: TestClient, mnist: Dataset) -> None:
    """All 10,000 test images, sent to /predict, give exactly the mistakes of the precision that is served."""
    manifest = read_manifest(folder)
    expected = {variant.precision: variant.test_mistakes for variant in manifest.variants}
    expected.setdefault("fp32", manifest.measured.test_mistakes)
    ready = client.get("/readyz").json()["models"]
    served = {(model["name"], model["version"]): model["precision"] for model in ready}
    mistakes = flagged = 0
    images, labels = mnist.images.numpy(), mnist.labels.numpy()
    for start in range(0, len(images), 1000):
        answer = client.post(
            f"/predict?model={manifest.name}/{manifest.version}",
            content=npy(images[start : start + 1000]),
            headers={**NPY, "accept": "application/x-npz"},
        )
        assert answer.status_code == 200, answer.text
        found = np.load(io.BytesIO(answer.content))
        mistakes += int((found["index"] != labels[start : start + 1000]).sum())
        flagged += int((~found["in_distribution"]).sum())
    assert (len(images), mistakes) == (
        manifest.measured.test_images,
        expected[served[manifest.name, manifest.version]],
    )
    assert 0 < flagged < 0.1 * len(images), "about one test image in twenty lies beyond the threshold"


@pytest.fixture(scope="module")
def prediction(client: TestClient) -> dict[str, Any]:
    answer = client.post(
        "/predict?capsules=true&reconstruction=true",
        content=(ROOT / "docs/examples/seven.png").read_bytes(),
        headers={"content-type": "image/png"},
    )
    (found,) = answer.json()["predictions"]
    return dict(found)


def test_a_real_digit(prediction: dict[str, Any]) -> None:
    """A seven is a seven, is drawn well, and is described by ten capsules of 16 dimensions."""
    assert prediction["label"] == "7"
    assert prediction["in_distribution"] is True
    assert np.shape(prediction["capsules"]) == (10, 16)
    assert np.argmax(prediction["lengths"]) == 7


def test_a_scanned_digit(client: TestClient) -> None:
    """A large image of dark ink on light paper is brought into the form of MNIST and understood."""
    page = (ROOT / "docs/examples/page.png").read_bytes()
    answer = client.post("/predict", content=page, headers={"content-type": "image/png"})
    assert answer.json()["predictions"][0]["label"] == "4"


PAGES = {
    "a white page": np.full((300, 200), 255, np.uint8),
    "a grey image of the model's size": np.full((28, 28), 90, np.uint8),
    "a black one": np.zeros((28, 28), np.uint8),
    "noise": np.random.default_rng(0).integers(0, 256, (280, 280), np.uint8),
    "a noisy page": np.random.default_rng(0).normal(200, 3, (300, 300)).astype(np.uint8),
}


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_a_page_with_nothing_on_it_is_no_digit(client: TestClient, page: NDArray[np.uint8]) -> None:
    """Where no ink is found, whatever the capsules say, the image is not one of a digit."""
    answer = client.post("/predict", content=encode(page), headers={"content-type": "image/png"})
    assert answer.json()["predictions"][0]["in_distribution"] is False


def draw(client: TestClient, **request: object) -> NDArray[np.float32]:
    answer = client.post("/reconstruct?pixels=true", json=request)
    assert answer.status_code == 200, answer.text
    return np.array(answer.json()["pixels"], dtype=np.float32)


def test_a_tweak_changes_the_digit(client: TestClient, prediction: dict[str, Any]) -> None:
    """Every dimension, changed by 0.25, draws another image, and none draws noise."""
    plain = draw(client, capsules=prediction["capsules"])
    assert plain.shape == (28, 28)
    assert plain.max() > 0.8, "ink in the middle"
    assert plain[0].max() < 0.2, "none at the border"
    for dimension in range(16):
        tweak = {"dimension": dimension, "delta": 0.25}
        changed = draw(client, capsules=prediction["capsules"], tweaks=[tweak])
        assert 0.01 < np.abs(changed - plain).sum() < 200


def test_another_class_draws_another_digit(client: TestClient, prediction: dict[str, Any]) -> None:
    """The mask lets only the asked-for class's capsule through."""
    capsules = prediction["capsules"]
    assert not np.allclose(draw(client, capsules=capsules), draw(client, capsules=capsules, **{"class": "3"}))
