"""Health and /models say what is served, and on what."""

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from service.manifest import read_manifest
from tests.api.conftest import Serve, problem


def test_the_process_is_live(client: TestClient) -> None:
    """/livez answers whatever the models do."""
    assert client.get("/livez").json() == {"status": "live"}


def test_the_service_is_ready_and_says_on_what(client: TestClient) -> None:
    """/readyz lists every model with the device that it runs on."""
    answer = client.get("/readyz")
    assert answer.json() == {
        "status": "ready",
        "models": [
            {"name": "colour", "version": "1", "device": "cpu", "precision": "fp32"},
            {"name": "tiny", "version": "2", "device": "cpu", "precision": "fp32"},
            {"name": "tiny", "version": "1", "device": "cpu", "precision": "fp32"},
        ],
    }


def test_a_stopping_service_is_not_ready_but_live_and_serving(serve: Serve) -> None:
    """From the signal to stop on, /readyz fails so that no new requests come."""
    client = serve()
    client.app.state.service.engine.ready = False  # type: ignore[attr-defined] # typed as any ASGI callable
    problem(client.get("/readyz"), 503)
    assert client.get("/livez").status_code == 200


def test_models_are_listed_with_their_manifests(client: TestClient, tiny_models: Path) -> None:
    """/models names each version, the default, the device, and holds the manifest as it was written."""
    models = client.get("/models").json()["models"]
    assert [(m["name"], m["version"], m["default"], m["device"]) for m in models] == [
        ("colour", "1", False, "cpu"),
        ("tiny", "2", True, "cpu"),
        ("tiny", "1", False, "cpu"),
    ]
    manifest = read_manifest(tiny_models / "tiny" / "2")
    assert models[1]["manifest"] == manifest.model_dump(mode="json")
    assert models[1]["threads"] >= 1


@pytest.mark.parametrize(
    "path",
    ["/livez", "/readyz", "/models", "/metrics", "/", "/docs", "/openapi.json", "/v2", "/v2/health/ready"],
)
def test_head_is_answered_as_get(client: TestClient, path: str) -> None:
    """Status and media type are those of GET, and both methods are allowed."""
    asked, got = client.head(path), client.get(path)
    assert (asked.status_code, asked.headers["content-type"]) == (200, got.headers["content-type"])
    assert set(client.put(path).headers["allow"].split(", ")) == {"GET", "HEAD"}


def test_pages_are_served(client: TestClient) -> None:
    """/ and /docs are pages, and /openapi.json is the document behind the latter."""
    assert client.get("/").headers["content-type"].startswith("text/html")
    assert client.get("/docs").headers["content-type"].startswith("text/html")
    assert client.get("/openapi.json").json()["info"]["title"]
