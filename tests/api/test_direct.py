"""The hot routes answer as they would through the framework."""

from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from service import app
from tests.support.encoded import base64_text, encode, npy
from tests.support.tiny_model import image_of

PNG = encode(image_of(3))
KEY = "a key of sixteen characters"
ORIGIN = "https://page.example"
IMAGE = {"content-type": "image/png"}
JSON = {"content-type": "application/json"}
PREFLIGHT = {"origin": ORIGIN, "access-control-request-method": "POST"}

# Each with the key and without; what differs from one answer to the next by itself is left out below.
REQUESTS: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/predict", {"content": PNG, "headers": IMAGE}),
    ("POST", "/predict", {"content": PNG, "headers": {**IMAGE, "origin": ORIGIN}}),
    ("POST", "/predict?capsules=true&image=true", {"content": PNG, "headers": IMAGE}),
    (
        "POST",
        "/predict",
        {"content": npy(image_of(3)[None]), "headers": {"content-type": "application/x-npy"}},
    ),
    ("POST", "/predict", {"files": [("images", ("a.png", PNG, "image/png"))] * 2}),
    ("POST", "/predict", {"files": [("other", ("a.png", PNG, "image/png"))]}),
    ("POST", "/predict", {"content": b"", "headers": IMAGE}),
    ("POST", "/predict", {"content": b"no image", "headers": IMAGE}),
    ("POST", "/predict", {"content": PNG, "headers": {"content-type": "text/plain"}}),
    ("POST", "/predict", {"content": PNG, "headers": {**IMAGE, "accept": "text/html"}}),
    ("POST", "/predict", {"content": bytes(20_000), "headers": IMAGE}),
    ("POST", "/predict?top_k=0", {"content": PNG, "headers": IMAGE}),
    ("POST", "/predict?model=none", {"content": PNG, "headers": IMAGE}),
    ("POST", "/%70redict", {"content": PNG, "headers": IMAGE}),
    ("POST", "/predict/", {"content": PNG, "headers": IMAGE}),
    ("POST", "//predict", {"content": PNG, "headers": IMAGE}),
    ("POST", "/Predict", {"content": PNG, "headers": IMAGE}),
    ("POST", "/reconstruct", {"json": {"image": base64_text(PNG)}}),
    ("POST", "/reconstruct", {"content": b"{", "headers": JSON}),
    ("POST", "/reconstruct", {"json": {"image": base64_text(PNG), "class": "none"}}),
    ("POST", "/reconstruct/sweep", {"json": {"image": base64_text(PNG), "deltas": [0.1]}}),
    ("POST", "/reconstruct/sweep/", {"json": {}}),
    ("POST", "/livez", {"content": PNG, "headers": IMAGE}),
    *((method, "/predict", {}) for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE")),
    ("OPTIONS", "/predict", {"headers": PREFLIGHT}),
    ("OPTIONS", "/reconstruct", {"headers": {**PREFLIGHT, "origin": "https://other.example"}}),
]


def answers(client: TestClient) -> list[tuple[Any, ...]]:
    found = []
    for method, path, parts in REQUESTS:
        for key in ({}, {"x-api-key": KEY}):
            headers = {**parts.get("headers", {}), **key, "x-request-id": "one"}
            answer = client.request(method, path, **{**parts, "headers": headers})
            told = sorted(item for item in answer.headers.multi_items() if item[0] != "server-timing")
            stages = [part.partition(";")[0] for part in answer.headers["server-timing"].split(", ")]
            found.append((method, path, answer.status_code, answer.content, told, stages))
    return found


def counted(client: TestClient) -> list[str]:
    text = client.get("/metrics", headers={"x-api-key": KEY}).text
    return [line for line in text.splitlines() if line.startswith("capsnet_requests_total")]


def test_they_answer_as_through_the_framework(
    serve: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status, headers, body, stages and counts are the same, whatever method, path, key, origin or fault."""
    settings = {"api_keys": KEY, "cors_origins": ORIGIN, "max_body": 10_000}
    direct = serve(**settings)
    seen = answers(direct)
    monkeypatch.setattr(app, "Direct", lambda inner, _: inner)
    framework = serve(**settings)

    assert seen == answers(framework)
    assert counted(direct) == counted(framework) != []
    assert {status for _, _, status, *_ in seen} >= {200, 400, 401, 404, 405, 406, 413, 415, 422}
