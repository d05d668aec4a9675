"""The OpenAPI document says what the routes really take and give."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from service.images import FORMATS
from service.schemas import PredictAnswer, ReconstructAnswer, SweepAnswer
from tests.support.encoded import base64_text, encode
from tests.support.tiny_model import picture

POSTS = ["/predict", "/reconstruct", "/reconstruct/sweep"]


@pytest.fixture(scope="module")
def document(client: TestClient) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    """No schema refers to one that is missing."""
    missing = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            reference = node.get("$ref")
            if reference and reference.rpartition("/")[2] not in document["components"]["schemas"]:
                missing.append(reference)
            for child in node.values():
                walk(child)
        elif isinstance(node, list):
            for child in node:
                walk(child)

    walk(document)
    assert missing == []


def test_every_body_is_documented(document: dict[str, Any]) -> None:
    """The media types of the document are those that the routes take."""
    content = document["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert set(content) == {*FORMATS, "multipart/form-data", "application/json", "application/x-npy"}
    for path in POSTS[1:]:
        content = document["paths"][path]["post"]["requestBody"]["content"]
        assert set(content) == {"multipart/form-data", "application/json"}


@pytest.mark.parametrize("path", POSTS)
def test_every_documented_body_but_no_other_is_taken(
    client: TestClient, document: dict[str, Any], path: str
) -> None:
    """A documented media type is never answered with 415, and an undocumented one always."""
    documented = set(document["paths"][path]["post"]["requestBody"]["content"])
    for media in documented | {"text/plain", "application/xml", "image/tiff", "application/octet-stream"}:
        status = client.post(path, content=b"x", headers={"content-type": media}).status_code
        assert (status == 415) == (media not in documented)


@pytest.mark.parametrize("path", POSTS)
def test_every_error_is_documented_as_a_problem(document: dict[str, Any], path: str) -> None:
    """Each status that a request can end in is there, with a problem document."""
    responses = document["paths"][path]["post"]["responses"]
    assert set(responses) == {"200", "400", "404", "406", "408", "413", "415", "422", "500", "503"}
    for status, response in responses.items():
        if status != "200":
            assert set(response["content"]) == {"application/problem+json"}


@pytest.mark.parametrize(
    ("path", "names"),
    [
        (
            "/predict",
            {"model", "preprocess", "capsules", "reconstruction", "image", "top_k"},
        ),
        ("/reconstruct", {"model", "preprocess", "pixels"}),
        ("/reconstruct/sweep", {"model", "preprocess"}),
    ],
)
def test_every_query_parameter_is_documented(document: dict[str, Any], path: str, names: set[str]) -> None:
    """Each has a description and a schema."""
    parameters = document["paths"][path]["post"]["parameters"]
    assert {parameter["name"] for parameter in parameters} == names
    assert all(parameter["description"] and parameter["schema"] for parameter in parameters)


def test_the_answers_are_of_the_documented_form(client: TestClient) -> None:
    """Routes build their answers by hand; each still is what the document says, field by field."""
    encoded = base64_text(encode(picture(1)))
    options = "?capsules=true&reconstruction=true&image=true"
    for model, answer in (
        (PredictAnswer, client.post(f"/predict{options}", json={"images": [encoded]})),
        (ReconstructAnswer, client.post("/reconstruct?pixels=true", json={"image": encoded})),
        (SweepAnswer, client.post("/reconstruct/sweep", json={"image": encoded})),
    ):
        document = answer.json()
        parsed = model.model_validate_json(answer.content, strict=True)
        assert parsed.model_dump(mode="json") == document
