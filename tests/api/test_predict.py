"""POST /predict takes every kind of body and answers in every form that it promises."""

import gzip
import io
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from tests.support.encoded import base64_text, decode_data_url, encode, npy
from tests.support.tiny_model import CLASSES, DIMENSIONS, image_of

PNG = encode(image_of(3))


def labels(answer: Any) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [prediction["label"] for prediction in answer.json()["predictions"]]


@pytest.mark.parametrize(
    ("media", "image_format"),
    [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP"), ("bmp", "BMP"), ("gif", "GIF")],
)
def test_an_image_is_the_body(client: TestClient, media: str, image_format: str) -> None:
    """One image of each format, with its own media type, is classified."""
    body = encode(image_of(3), image_format)
    answer = client.post("/predict", content=body, headers={"content-type": f"image/{media}"})
    assert labels(answer) == ["3"]


def test_the_answer_has_the_contracts_fields(client: TestClient) -> None:
    """Label, index, length, lengths, top and the in-distribution check; nothing that was not asked for."""
    answer = client.post("/predict", content=PNG, headers={"content-type": "image/png"})
    assert answer.headers["content-type"] == "application/json"
    document = answer.json()
    assert document["model"] == {"name": "tiny", "version": "2"}
    (prediction,) = document["predictions"]
    assert set(prediction) == {
        "label",
        "index",
        "length",
        "lengths",
        "top",
        "reconstruction_error",
        "in_distribution",
    }
    assert (prediction["label"], prediction["index"]) == ("3", 3)
    assert prediction["length"] == prediction["lengths"][3] == pytest.approx(1, abs=1e-3)
    assert len(prediction["lengths"]) == CLASSES
    assert prediction["top"][0] == {"label": "3", "index": 3, "length": prediction["length"]}
    assert len(prediction["top"]) == 3
    assert prediction["reconstruction_error"] == pytest.approx(0, abs=1e-3)
    assert prediction["in_distribution"] is True


def test_several_parts_are_several_predictions_in_order(client: TestClient) -> None:
    """A form with parts `images` gives one prediction for each, in order."""
    files = [("images", (f"{index}.png", encode(image_of(index)), "image/png")) for index in (5, 1, 9)]
    assert labels(client.post("/predict", files=files)) == ["5", "1", "9"]


def test_json_holds_base64_and_data_urls(client: TestClient) -> None:
    """JSON may mix plain base64 and data URLs."""
    images = [base64_text(PNG), "data:image/png;base64," + base64_text(encode(image_of(8)))]
    assert labels(client.post("/predict", json={"images": images})) == ["3", "8"]


def test_npy_is_taken_as_it_is(client: TestClient) -> None:
    """An npy array of many images, more than one batch, is answered image by image."""
    images = np.stack([image_of(index % CLASSES) for index in range(100)])
    answer = client.post("/predict", content=npy(images), headers={"content-type": "application/x-npy"})
    assert labels(answer) == [str(index % CLASSES) for index in range(100)]


def test_what_is_asked_for_is_added(client: TestClient) -> None:
    """capsules, reconstruction and image add the vectors, the drawing and what the network saw."""
    dark = encode(255 - image_of(3))
    answer = client.post(
        "/predict?capsules=true&reconstruction=true&image=true&preprocess=none",
        content=dark,
        headers={"content-type": "image/png"},
    )
    (prediction,) = answer.json()["predictions"]
    assert np.array(prediction["capsules"]).shape == (CLASSES, DIMENSIONS)
    np.testing.assert_allclose(np.array(prediction["capsules"])[:, 0], prediction["lengths"], atol=1e-6)
    np.testing.assert_array_equal(decode_data_url(prediction["image"]), 255 - image_of(3))
    assert decode_data_url(prediction["reconstruction"]).shape == (28, 28)


@pytest.mark.parametrize(("spelled", "added"), [("True", True), ("False", False)])
def test_pythons_true_and_false_are_taken(client: TestClient, spelled: str, added: bool) -> None:
    """The Python clients that many use write a flag of the query so."""
    answer = client.post(f"/predict?capsules={spelled}", content=PNG, headers={"content-type": "image/png"})
    assert ("capsules" in answer.json()["predictions"][0]) is added


def test_every_form_of_answer_names_its_model(client: TestClient) -> None:
    """Arrays and images have no place for it, so a header has it."""
    headers = {"content-type": "image/png"}
    for accept in ("application/json", "application/x-npy", "application/x-npz"):
        answer = client.post("/predict?model=tiny/1", content=PNG, headers={**headers, "accept": accept})
        assert answer.headers["x-capsnet-model"] == "tiny/1"
    form = {"image": ("a.png", PNG, "image/png")}
    for path in ("/reconstruct", "/reconstruct/sweep"):
        answer = client.post(path, files=form, headers={"accept": "image/png"})
        assert answer.headers["x-capsnet-model"] == "tiny/2"


def test_preprocessing_is_on_by_default(client: TestClient) -> None:
    """A large image of dark ink is laid out for the network, and the answer shows how."""
    paper = np.full((300, 200), 250, np.uint8)
    paper[140:160, 40:160] = 20
    answer = client.post("/predict?image=true", content=encode(paper), headers={"content-type": "image/png"})
    seen = decode_data_url(answer.json()["predictions"][0]["image"])
    assert seen.shape == (28, 28)
    assert seen[14, 14] == 255
    assert seen[0].max() == 0
    assert np.ptp(np.nonzero(seen > 32)[1]) + 1 == 20


@pytest.mark.parametrize(("top_k", "listed"), [(1, 1), (5, 5), (10, 10), (1000, 10)])
def test_top_k_says_how_many(client: TestClient, top_k: int, listed: int) -> None:
    """`top` lists the longest capsules, longest first, at most all of them."""
    mixed = image_of(3)
    mixed += image_of(6, level=100)
    answer = client.post(
        f"/predict?top_k={top_k}", content=encode(mixed), headers={"content-type": "image/png"}
    )
    top = answer.json()["predictions"][0]["top"]
    assert len(top) == listed
    assert [entry["label"] for entry in top[:2]] == ["3", "6"][:listed]


@pytest.mark.parametrize(
    ("reference", "chosen"),
    [("tiny", ("tiny", "2")), ("tiny/1", ("tiny", "1")), ("colour", ("colour", "1"))],
)
def test_the_model_is_chosen_by_name_or_version(
    client: TestClient, reference: str, chosen: tuple[str, str]
) -> None:
    """model=name is its newest version, model=name/version that one."""
    answer = client.post(
        "/predict", params={"model": reference}, content=PNG, headers={"content-type": "image/png"}
    )
    assert answer.json()["model"] == {"name": chosen[0], "version": chosen[1]}
    assert labels(answer) == ["3"]


def test_bulk_callers_get_arrays(client: TestClient) -> None:
    """Accept: application/x-npy gives the lengths, x-npz all arrays by their names."""
    images = np.stack([image_of(2), image_of(4)])
    headers = {"content-type": "application/x-npy"}
    answer = client.post("/predict", content=npy(images), headers=headers | {"accept": "application/x-npy"})
    lengths = np.load(io.BytesIO(answer.content))
    np.testing.assert_allclose(lengths, np.eye(CLASSES)[[2, 4]], atol=1e-3)

    answer = client.post(
        "/predict?reconstruction=true&image=true",
        content=npy(images),
        headers=headers | {"accept": "application/x-npz"},
    )
    assert answer.headers["content-type"] == "application/x-npz"
    arrays = np.load(io.BytesIO(answer.content))
    assert {name: (arrays[name].dtype.name, arrays[name].shape) for name in arrays} == {
        "digit_capsules": ("float32", (2, CLASSES, DIMENSIONS)),
        "capsule_lengths": ("float32", (2, CLASSES)),
        "index": ("int64", (2,)),
        "reconstruction_error": ("float32", (2,)),
        "in_distribution": ("bool", (2,)),
        "reconstructions": ("float32", (2, 28, 28)),
        "images": ("uint8", (2, 28, 28)),
    }
    assert arrays["index"].tolist() == [2, 4]
    np.testing.assert_array_equal(arrays["images"], images)


def test_a_colour_model_takes_colour(client: TestClient) -> None:
    """Images and arrays with three channels go to a model of three channels."""
    images = np.stack([image_of(6, channels=3)])
    answer = client.post(
        "/predict?model=colour&reconstruction=true",
        content=npy(images),
        headers={"content-type": "application/x-npy"},
    )
    assert labels(answer) == ["6"]
    drawn = decode_data_url(answer.json()["predictions"][0]["reconstruction"])
    np.testing.assert_allclose(drawn.astype(int), images[0], atol=1)


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", "application/json"),
        ("application/*", "application/json"),
        ("text/html, application/json;q=0.9, */*;q=0.1", "application/json"),
        ("application/json;q=0.1, application/x-npy", "application/x-npy"),
        ("application/json;q=0, */*", "application/x-npy"),
        ("*/*, application/json;q=0.1", "application/x-npy"),
    ],
)
def test_the_best_accepted_form_is_chosen(client: TestClient, accept: str, kind: str) -> None:
    """Qualities and specificity of Accept decide, as RFC 9110 has it."""
    answer = client.post("/predict", content=PNG, headers={"content-type": "image/png", "accept": accept})
    assert answer.headers["content-type"] == kind


def test_accept_may_come_in_several_lines(client: TestClient) -> None:
    """They count as one list (RFC 9110, 5.3)."""
    headers = [("content-type", "image/png"), ("accept", "text/html"), ("accept", "application/x-npy")]
    answer = client.post("/predict", content=PNG, headers=headers)
    assert answer.headers["content-type"] == "application/x-npy"


@pytest.mark.parametrize(
    ("encoding", "compress"),
    [("gzip", gzip.compress), ("X-Gzip", gzip.compress), ("Deflate", zlib.compress)],
)
def test_a_compressed_body_is_taken(
    client: TestClient, encoding: str, compress: Callable[[bytes], bytes]
) -> None:
    """Content-Encoding is undone before the body is looked at, whatever its media type."""
    for kind, body in (("image/png", PNG), ("application/x-npy", npy(image_of(3)[None]))):
        headers = {"content-type": kind, "content-encoding": encoding}
        assert labels(client.post("/predict", content=compress(body), headers=headers)) == ["3"]


def test_concurrent_callers_get_their_own_answers(client: TestClient) -> None:
    """Requests that share batches do not share answers."""

    def ask(index: int) -> list[str]:
        return labels(
            client.post("/predict", content=encode(image_of(index)), headers={"content-type": "image/png"})
        )

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(ask, [index % CLASSES for index in range(64)]))
    assert answers == [[str(index % CLASSES)] for index in range(64)]
