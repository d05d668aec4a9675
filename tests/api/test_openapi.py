"""The OpenAPI document says what the routes really take and give."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.images import FORMATS
from service.schemas import PredictAnswer, ReconstructAnswer, SweepAnswer
from tests.support.encoded import base64_text, encode
from tests.support.tiny_model import image_of

POSTS = ["/predict", "/reconstruct", "/reconstruct/sweep"]


@pytest.fixture(scope="module")
def document(client: TestClient) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def nodes(part: Any) -> Iterator[dict[str, Any]]:
    """Every object inside a JSON document, outermost first."""
    if isinstance(part, dict):
        yield part
    if isinstance(part, dict | list):
        for child in part.values() if isinstance(part, dict) else part:
            yield from nodes(child)


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    """No schema refers to one that is missing."""
    missing = []
    for node in nodes(document):
        if reference := node.get("$ref"):
            _, _, kind, name = reference.split("/")
            if name not in document["components"][kind]:
                missing.append(reference)
    assert missing == []


def test_every_body_is_documented(document: dict[str, Any]) -> None:
    """The media types of the document are those that the routes take."""
    content = document["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert set(content) == {*FORMATS, "multipart/form-data", "application/json", "application/x-npy"}
    for path in POSTS[1:]:
        content = document["paths"][path]["post"]["requestBody"]["content"]
        assert set(content) == {"multipart/form-data", "application/json"}


@pytest.mark.parametrize(
    ("path", "part"), [("/predict", "images"), ("/reconstruct", "image"), ("/reconstruct/sweep", "image")]
)
def test_a_forms_files_are_said_to_need_a_filename(document: dict[str, Any], path: str, part: str) -> None:
    """Without one a part is a text, which is refused: the document says so."""
    form = document["paths"][path]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert "needs a `filename`" in form["properties"][part]["description"]


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


def test_a_parameters_bounds_are_in_json_schemas_words(document: dict[str, Any]) -> None:
    """What a parameter's schema says of a number is what validators and clients understand."""
    parameters = document["paths"]["/predict"]["post"]["parameters"]
    top_k = next(parameter["schema"] for parameter in parameters if parameter["name"] == "top_k")
    assert top_k == {"type": "integer", "minimum": 1, "maximum": 1000, "default": 3}


def test_no_default_is_a_value_that_would_be_refused(document: dict[str, Any]) -> None:
    """An empty text or list that stands for nothing given is not offered as a value to send."""
    refused = []
    for node in nodes(document):
        if "default" in node and len(str(node["default"])) < node.get("minLength", 0):
            refused.append(node)
        if node.get("default") == [] and node.get("minItems", 0) > 0:
            refused.append(node)
    assert refused == []


def test_what_excludes_another_has_no_default(document: dict[str, Any]) -> None:
    """A client that sends defaults, as generated ones may, would send both of two that exclude each other."""
    defaults = []
    for schema in document["components"]["schemas"].values():
        for alternative in schema.get("oneOf", []):
            for name in alternative.get("required", []):
                defaults += [name] if "default" in schema["properties"][name] else []
    assert defaults == []


@pytest.mark.parametrize(("path", "form"), [(POSTS[1], "ReconstructRequest"), (POSTS[2], "SweepRequest")])
def test_every_example_is_answered(
    client: TestClient, document: dict[str, Any], path: str, form: str
) -> None:
    """What the page offers to try works."""
    for example in document["components"]["schemas"][form]["examples"]:
        assert client.post(path, json=example).status_code == 200


def test_limits_of_the_settings_are_documented(serve: Callable[..., TestClient]) -> None:
    """As many images, tweaks and deltas as the settings allow are what the document allows."""
    served = serve(max_images=7, max_tweaks=5, max_deltas=3).get("/openapi.json").json()
    schemas = served["components"]["schemas"]
    assert schemas["PredictRequest"]["properties"]["images"]["maxItems"] == 7
    for name in ("ReconstructRequest", "ReconstructChoice", "SweepRequest", "SweepChoice"):
        assert schemas[name]["properties"]["tweaks"]["maxItems"] == 5
    for name in ("SweepRequest", "SweepChoice"):
        assert schemas[name]["properties"]["deltas"]["maxItems"] == 3


def test_every_answer_documents_its_headers(client: TestClient, document: dict[str, Any]) -> None:
    """The request's id and its timing are on every answer, and Retry-After on those of an overload."""
    for operations in document["paths"].values():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                assert {"X-Request-ID", "Server-Timing"} <= set(response["headers"])
                assert ("Retry-After" in response["headers"]) == (status == "503")
    answer = client.get("/livez")
    assert {"x-request-id", "server-timing"} <= set(answer.headers)


@pytest.mark.parametrize("accept", ["text/plain", "application/openmetrics-text; version=1.0.0"])
def test_both_forms_of_the_metrics_are_documented(
    client: TestClient, document: dict[str, Any], accept: str
) -> None:
    """Whichever form Prometheus asks for, the document has its media type."""
    found = client.get("/metrics", headers={"accept": accept}).headers["content-type"].partition(";")[0]
    assert found == accept.partition(";")[0]
    assert found in document["paths"]["/metrics"]["get"]["responses"]["200"]["content"]


def test_the_protocols_routes_document_their_path_and_nothing_else(document: dict[str, Any]) -> None:
    """A version belongs into the path; FastAPI's own validation errors never come."""
    parameters = document["paths"]["/v2/models/{name}"]["get"]["parameters"]
    assert [(parameter["name"], parameter["in"]) for parameter in parameters] == [("name", "path")]
    for path, operations in document["paths"].items():
        if path.startswith("/v2"):
            assert all("422" not in operation["responses"] for operation in operations.values())
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_a_version_in_the_query_changes_nothing(client: TestClient) -> None:
    """Only the path chooses a version."""
    newest = client.get("/v2/models/tiny-encoder").json()
    assert client.get("/v2/models/tiny-encoder?version=99").json() == newest


def test_the_answers_are_of_the_documented_form(client: TestClient) -> None:
    """Routes build their answers by hand; each still is what the document says, field by field."""
    encoded = base64_text(encode(image_of(1)))
    options = "?capsules=true&reconstruction=true&image=true"
    for model, answer in (
        (PredictAnswer, client.post(f"/predict{options}", json={"images": [encoded]})),
        (ReconstructAnswer, client.post("/reconstruct?pixels=true", json={"image": encoded})),
        (SweepAnswer, client.post("/reconstruct/sweep", json={"image": encoded})),
    ):
        document = answer.json()
        parsed = model.model_validate_json(answer.content, strict=True)
        assert parsed.model_dump(mode="json") == document
