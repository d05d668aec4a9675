"""POST /reconstruct and /reconstruct/sweep draw what the tiny decoder's arithmetic gives by hand."""

import gzip
import io
import json
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from tests.support.encoded import base64_text, decode, decode_data_url, encode
from tests.support.tiny_model import CLASSES, DIMENSIONS, band, image_of

IMAGE = encode(image_of(3, level=102))  # a capsule of length 0.4
ENCODED = base64_text(IMAGE)


def ask(client: TestClient, path: str = "/reconstruct", /, **body: Any) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()
    return document


@pytest.mark.parametrize("path", ["/reconstruct", "/reconstruct/sweep"])
@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "gzip,", " , gzip"])
def test_a_compressed_body_is_taken(client: TestClient, path: str, encoding: str) -> None:
    """A body that says gzip gives what the same body gives as it is; empty members of a list say nothing."""
    body = json.dumps({"image": ENCODED, "class": "3"}).encode()
    headers = {"content-type": "application/json"}
    packed = client.post(path, content=gzip.compress(body), headers={**headers, "content-encoding": encoding})
    assert packed.status_code == 200, packed.text
    for nothing in ("", ",", "identity"):
        plain = client.post(path, content=body, headers={**headers, "content-encoding": nothing})
        assert packed.json() == plain.json()


def light(drawn: Any, index: int) -> float:
    """The level of a class's band in a reconstruction, in [0, 1]."""
    levels = np.asarray(drawn, float)
    inside = levels[band(index), 4:24]
    assert np.ptp(inside) == 0
    return float(inside.max() / (255 if levels.max() > 1 else 1))


def test_an_image_is_drawn_again(client: TestClient) -> None:
    """Without a class the predicted one is drawn, from its capsule, which the answer holds."""
    document = ask(client, image=ENCODED)
    assert (document["label"], document["index"]) == ("3", 3)
    assert document["model"] == {"name": "tiny", "version": "2"}
    assert document["capsule"] == pytest.approx([0.4] + [0] * 15, abs=1e-3)
    np.testing.assert_allclose(
        decode_data_url(document["reconstruction"]).astype(int), image_of(3, 102), atol=1
    )
    assert "pixels" not in document


def test_tweaks_change_the_capsule_and_the_reconstruction(client: TestClient) -> None:
    """A delta adds to one dimension and a value sets one, and the reconstruction follows."""
    tweaks = [{"dimension": 15, "delta": 0.25}, {"dimension": 0, "value": 0.5}]
    document = ask(client, image=ENCODED, tweaks=tweaks)
    assert document["capsule"] == pytest.approx([0.5] + [0] * 14 + [0.25])
    assert light(decode_data_url(document["reconstruction"]), 3) == pytest.approx(0.75, abs=1 / 255)


def test_the_largest_tweaks_are_taken(client: TestClient) -> None:
    """Up to ten a dimension may be moved or set, either way."""
    tweaks = [{"dimension": 1, "delta": 10}, {"dimension": 2, "value": -10}]
    assert ask(client, image=ENCODED, tweaks=tweaks)["capsule"][1:3] == [10, -10]


def test_another_class_is_drawn_from_its_own_capsule(client: TestClient) -> None:
    """Asking for class 7 draws capsule 7, tweaked, and masks the predicted one."""
    document = ask(client, image=ENCODED, tweaks=[{"dimension": 2, "delta": 0.6}], **{"class": "7"})
    drawn = decode_data_url(document["reconstruction"])
    assert document["label"] == "7"
    assert light(drawn, 7) == pytest.approx(0.6, abs=1 / 255)
    assert light(drawn, 3) == 0


def test_what_predict_returned_can_be_sent_back(client: TestClient) -> None:
    """Capsules from /predict give the same drawings and capsule as the image that they came from."""
    predicted = client.post(
        "/predict?capsules=true", content=IMAGE, headers={"content-type": "image/png"}
    ).json()
    capsules = predicted["predictions"][0]["capsules"]
    for path in ("/reconstruct", "/reconstruct/sweep"):
        from_capsules, from_image = (
            ask(client, path, **source, tweaks=[{"dimension": 1, "delta": 0.1}])
            for source in ({"capsules": capsules}, {"image": ENCODED})
        )
        assert from_capsules == from_image


def test_the_longest_of_given_capsules_is_the_predicted_class(client: TestClient) -> None:
    """The class of capsules is that of the greatest length, not of the greatest component."""
    capsules = np.zeros((CLASSES, DIMENSIONS))
    capsules[2, 0] = 0.5
    capsules[6, :4] = -0.4  # a length of 0.8
    assert ask(client, capsules=capsules.tolist())["label"] == "6"


def test_pixels_are_numbers(client: TestClient) -> None:
    """pixels=true adds the reconstruction as numbers in [0, 1], unrounded."""
    answer = client.post("/reconstruct?pixels=true", json={"image": ENCODED})
    pixels = np.array(answer.json()["pixels"])
    assert pixels.shape == (28, 28)
    assert light(pixels, 3) == pytest.approx(0.4, abs=1e-3)


def test_the_reconstruction_itself(client: TestClient) -> None:
    """Accept: image/png answers with the PNG."""
    answer = client.post("/reconstruct", json={"image": ENCODED}, headers={"accept": "image/png"})
    assert answer.headers["content-type"] == "image/png"
    np.testing.assert_allclose(decode(answer.content).astype(int), image_of(3, 102), atol=1)


@pytest.mark.parametrize("as_file", [False, True])
def test_a_form_says_the_same(client: TestClient, as_file: bool) -> None:
    """Parts `image` and `request`, as text or as file, are answered like the JSON body."""
    request: dict[str, Any] = {"class": "3", "tweaks": [{"dimension": 0, "delta": 0.1}]}
    text = json.dumps(request).encode()
    part = ("request.json", text, "application/json") if as_file else (None, text, "application/json")
    answer = client.post("/reconstruct", files={"image": ("i.png", IMAGE, "image/png"), "request": part})
    assert answer.json() == ask(client, image=ENCODED, **request)


def test_a_form_may_hold_the_image_alone(client: TestClient) -> None:
    """Without a part `request` the predicted class is drawn as it is."""
    answer = client.post("/reconstruct", files={"image": ("i.png", IMAGE, "image/png")})
    assert answer.json() == ask(client, image=ENCODED)


def test_a_colour_model_draws_in_colour(client: TestClient) -> None:
    """The reconstruction of a colour model has three channels."""
    answer = client.post(
        "/reconstruct?model=colour", json={"image": base64_text(encode(image_of(2, channels=3)))}
    )
    assert decode_data_url(answer.json()["reconstruction"]).shape == (28, 28, 3)


def test_a_sweep_covers_the_papers_figure(client: TestClient) -> None:
    """By default all 16 dimensions go from -0.25 to 0.25 by 0.05, each from the image's capsule."""
    document = ask(client, "/reconstruct/sweep", image=ENCODED)
    assert document["dimensions"] == list(range(DIMENSIONS))
    assert document["deltas"] == pytest.approx(np.linspace(-0.25, 0.25, 11))
    assert document["capsule"] == pytest.approx([0.4] + [0] * 15, abs=1e-3)
    levels = [[light(decode_data_url(url), 3) for url in row] for row in document["reconstructions"]]
    np.testing.assert_allclose(levels, [np.linspace(0.15, 0.65, 11)] * DIMENSIONS, atol=2 / 255)


def test_a_sweep_names_its_dimensions(client: TestClient) -> None:
    """Each dimension that is swept has the name that the manifest gives it for the class that is drawn."""
    document = ask(client, "/reconstruct/sweep", image=ENCODED, dimensions=[9, 1], **{"class": "5"})
    assert document["names"] == ["light 9 of 5", "light 1 of 5"]
    assert len(ask(client, "/reconstruct/sweep", image=ENCODED)["names"]) == DIMENSIONS


def test_a_model_that_names_nothing_is_swept_all_the_same(client: TestClient) -> None:
    """Where the manifest is silent there are no names, neither in JSON nor in the figure."""
    path = "/reconstruct/sweep?model=tiny/1"
    body = {"image": ENCODED, "dimensions": [0, 5]}
    document = client.post(path, json=body).json()
    assert (document["names"], len(document["reconstructions"])) == ([], 2)
    figure = client.post(path, json=body, headers={"accept": "image/png"})
    assert decode(figure.content).shape == (48 + 2 * 58, 48 + 11 * 58)


def test_models_say_what_the_dimensions_do(client: TestClient) -> None:
    """/models has the measurements behind the names."""
    served = {(m["name"], m["version"]): m["manifest"] for m in client.get("/models").json()["models"]}
    assert served["tiny", "1"]["dimensions"] == {}
    assert served["tiny", "2"]["dimensions"]["3"][4] == {
        "name": "light 4 of 3",
        "moved": 0.25,
        "effects": {"ink": {"change": 50, "agreement": 1}},
        "shares": {"amount of ink": 1},
    }


def test_a_sweep_of_what_is_asked_for(client: TestClient) -> None:
    """Dimensions, deltas, class and tweaks of the caller's own; an npz has them as arrays."""
    body = {
        "image": ENCODED,
        "class": "5",
        "dimensions": [9, 1],
        "deltas": [0, 0.5],
        "tweaks": [{"dimension": 4, "value": 0.25}],
    }
    answer = client.post("/reconstruct/sweep", json=body, headers={"accept": "application/x-npz"})
    arrays = np.load(io.BytesIO(answer.content))
    assert arrays["reconstructions"].shape == (2, 2, 28, 28)
    np.testing.assert_allclose(arrays["reconstructions"][:, :, band(5).start, 4], [[0.25, 0.75]] * 2)
    assert arrays["dimensions"].tolist() == [9, 1]
    assert arrays["deltas"].tolist() == [0, 0.5]
    assert arrays["capsule"][4] == 0.25


def test_a_sweep_as_a_figure(client: TestClient) -> None:
    """Accept: image/png gives a grid whose tiles grow lighter from left to right."""
    answer = client.post(
        "/reconstruct/sweep", json={"image": ENCODED, "dimensions": [0, 5]}, headers={"accept": "image/png"}
    )
    assert answer.headers["content-type"] == "image/png"
    figure = decode(answer.content)
    left = figure.shape[1] - 11 * 58
    assert figure.shape[0] == 48 + 2 * 58
    assert left > 48, "names take more room than numbers"
    y = 48 + 2 * band(3).start
    assert [int(figure[y, left + column * 58 + 20]) for column in range(11)] == pytest.approx(
        np.linspace(0.15, 0.65, 11) * 255, abs=1
    )


def test_a_sweep_takes_a_form(client: TestClient) -> None:
    """The sweep's parts are those of /reconstruct."""
    files = {
        "image": ("i.png", IMAGE, "image/png"),
        "request": (None, b'{"dimensions": [0], "deltas": [0.1]}', "application/json"),
    }
    answer = client.post("/reconstruct/sweep", files=files)
    assert answer.json() == ask(client, "/reconstruct/sweep", image=ENCODED, dimensions=[0], deltas=[0.1])


def test_a_dimension_may_be_written_with_a_decimal_point(client: TestClient) -> None:
    """3.0 is the integer 3, as in JSON Schema, whose words the document uses; 3.5 is none."""
    image = base64_text(encode(image_of(1)))
    plain, pointed = (
        client.post("/reconstruct", json={"image": image, "tweaks": [{"dimension": written, "delta": 0.2}]})
        for written in (3, 3.0)
    )
    assert pointed.status_code == 200
    assert pointed.json() == plain.json()
    swept = client.post("/reconstruct/sweep", json={"image": image, "dimensions": [3.0]})
    assert swept.json()["dimensions"] == [3]
    refused = client.post("/reconstruct/sweep", json={"image": image, "dimensions": [3.5]})
    assert refused.status_code == 422
