"""The repository extension over HTTP: off unless asked for, and under load nothing is lost."""

import asyncio
import json
import logging
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import onnxruntime
import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.settings import Settings
from tests.api.conftest import Serve
from tests.api.test_oip import error
from tests.support.encoded import base64_text, encode
from tests.support.tiny_model import CLASSES, image_of, write_tiny_model

INDEX = "/v2/repository/index"
LOAD = "/v2/repository/models/tiny-encoder/load"
UNLOAD = "/v2/repository/models/tiny-encoder/unload"
KEY = "sesame-sesame-sesame"
LIMIT = 60.0  # seconds after which a test that hangs has failed


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A models folder of the test's own: `tiny` in version 1."""
    write_tiny_model(tmp_path / "models", "tiny", "1")
    return tmp_path / "models"


@pytest.fixture
def client(serve: Serve, models: Path) -> TestClient:
    return serve(models=models, repository=True)


def versions(client: TestClient) -> list[str]:
    return [model["version"] for model in client.get("/models").json()["models"]]


def test_it_is_off_unless_enabled(serve: Serve, client: TestClient) -> None:
    """Without the setting there are no such paths, and the metadata does not name the extension."""
    plain = serve()
    for path in (INDEX, LOAD, UNLOAD):
        assert "Not Found" in error(plain.post(path), 404)
        assert path not in plain.get("/openapi.json").json()["paths"]
    assert plain.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data", "model_repository"]


def test_it_needs_a_key_where_there_are_keys(serve: Serve, models: Path) -> None:
    """Whoever may not predict may not change what is served either."""
    guarded = serve(models=models, repository=True, api_keys=KEY)
    write_tiny_model(models, "tiny", "2")
    for path in (INDEX, LOAD, UNLOAD):
        assert guarded.post(path).status_code == 401
    assert guarded.post(LOAD, headers={"x-api-key": KEY}).status_code == 200


HERE, THERE, FRIEND = "http://testserver", "https://elsewhere.example", "https://friend.example"


@pytest.mark.parametrize(
    ("headers", "admitted"),
    [
        ({"sec-fetch-site": "cross-site", "origin": THERE}, False),
        ({"sec-fetch-site": "same-site", "origin": "http://testserver:8080"}, False),
        ({"origin": THERE}, False),
        ({"origin": "null"}, False),
        ({"origin": "http://["}, False),
        ({"origin": "http://testserver/"}, False),
        ({"origin": "testserver"}, False),
        ({"sec-fetch-site": "same-origin", "origin": "https://before.the.proxy"}, True),
        ({"sec-fetch-site": "none"}, True),
        ({"origin": HERE}, True),
        ({"sec-fetch-site": "cross-site", "origin": FRIEND}, True),
    ],
)
def test_pages_from_elsewhere_change_nothing(
    serve: Serve, models: Path, headers: dict[str, str], admitted: bool
) -> None:
    """A page that somebody visits may send a POST to any address; it changes what is served only if named."""
    client = serve(models=models, repository=True, cors_origins=FRIEND)
    write_tiny_model(models, "tiny", "2")
    answer = client.post(LOAD, headers=headers)
    assert versions(client) == (["2", "1"] if admitted else ["1"])
    assert answer.status_code == 200 if admitted else "CAPSNET_CORS_ORIGINS" in error(answer, 400)


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this ONNX Runtime has CUDA"
)
def test_a_load_says_nothing_more_of_a_device_that_is_not_there(
    serve: Serve, models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Which device `auto` is, the start finds out for good, and its one line says it."""
    with caplog.at_level(logging.INFO):
        client = serve(models=models, repository=True, device="auto")
        write_tiny_model(models, "tiny", "2")
        assert client.post(LOAD).status_code == 200
    assert sum("CUDA is not in use" in message for message in caplog.messages) == 1


def test_a_version_comes_and_goes(client: TestClient, models: Path) -> None:
    """The index, /models and the answers agree at every step."""
    write_tiny_model(models, "tiny", "2")
    index = client.post(INDEX)
    assert index.status_code == 200
    assert index.json()[0] == {
        "name": "tiny-encoder",
        "version": "2",
        "state": "UNAVAILABLE",
        "reason": "not loaded",
    }
    assert client.post(LOAD).content == b""
    assert versions(client) == ["2", "1"]
    assert client.get("/v2/models/tiny-decoder").json()["versions"] == ["2", "1"]
    assert [model["default"] for model in client.get("/models").json()["models"]] == [True, False]
    assert client.post(UNLOAD, json={"parameters": {"version": "1"}}).status_code == 200
    assert versions(client) == ["2"]
    assert {entry["version"] for entry in client.post(INDEX, json={"ready": True}).json()} == {"2"}
    assert client.get("/v2/models/tiny-encoder/versions/1").status_code == 404


def test_refusals_are_the_protocols_errors(client: TestClient, models: Path) -> None:
    """Each says what is wrong without telling where our folders lie, and changes nothing."""
    os.truncate(write_tiny_model(models, "tiny", "2") / "encoder.onnx", 100)
    for path, body, status, words in (
        (LOAD, None, 400, "tiny/2/encoder.onnx: sha256"),
        (UNLOAD, None, 400, "one version must stay"),
        (UNLOAD, {"parameters": {"version": "9"}}, 404, "expected one of 2, 1"),
        (LOAD.replace("tiny-encoder", "tiny"), None, 404, "expected one of tiny-decoder, tiny-encoder"),
        (LOAD, {"parameters": {"config": "{}"}}, 400, "received config, expected version"),
        (LOAD, {"parameters": {"version": 2}}, 400, "expected a version as '2'"),
        (LOAD, {"parameters": {"version": None}}, 400, "received null"),
        (LOAD, {"parameters": ["version"]}, 400, "parameters"),
        (INDEX, {"ready": "yes"}, 400, "ready"),
    ):
        answer = client.post(path, json=body) if body is not None else client.post(path)
        text = error(answer, status)
        assert words in text
        assert str(models.parent) not in text
    assert versions(client) == ["1"]


def test_the_document_describes_it(client: TestClient) -> None:
    """The three operations are in /docs with their bodies, which may be absent."""
    paths = client.get("/openapi.json").json()["paths"]
    for path in (INDEX, LOAD.replace("tiny-encoder", "{name}"), UNLOAD.replace("tiny-encoder", "{name}")):
        assert paths[path]["post"]["requestBody"]["required"] is False
        assert {"200", "400", "404", "503"} <= set(paths[path]["post"]["responses"])


@asynccontextmanager
async def running(models: Path, **changes: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """The service on the test's own event loop."""
    values = {"models": models, "device": "cpu", "default_model": "tiny", "repository": True, **changes}
    app = create_app(Settings.model_validate(values))
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    async with (
        asyncio.timeout(LIMIT),
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://test", timeout=LIMIT) as client,
    ):
        yield client


async def change(client: httpx2.AsyncClient, path: str, version: str | None = None) -> None:
    body = {} if version is None else {"parameters": {"version": version}}
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text


@pytest.mark.anyio
async def test_nothing_is_lost_while_versions_are_replaced(models: Path) -> None:
    """Under load every answer is right, and of the version that was the newest when it was asked for."""
    answered: list[str] = []
    oldest = newest = 1
    stopped = False

    async def ask(client: httpx2.AsyncClient, caller: int) -> None:
        label = caller % CLASSES
        body = encode(image_of(label))
        tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 28, 28]}
        text = {"inputs": [{**tensor, "data": image_of(label).ravel().tolist()}]}
        while not stopped:
            from_version = oldest
            if caller % 2:
                answer = await client.post("/predict", content=body, headers={"content-type": "image/png"})
                assert answer.status_code == 200, answer.text
                document = answer.json()
                version = document["model"]["version"]
                assert document["predictions"][0]["index"] == label
                assert document["predictions"][0]["in_distribution"]
            else:
                answer = await client.post("/v2/models/tiny-encoder/infer", json=text)
                assert answer.status_code == 200, answer.text
                document = answer.json()
                version = document["model_version"]
                assert int(np.argmax(document["outputs"][1]["data"])) == label
            assert from_version <= int(version) <= newest
            answered.append(version)

    async with running(models, max_batch=4) as client, asyncio.TaskGroup() as group:
        for caller in range(8):
            group.create_task(ask(client, caller))
        for successor in range(2, 7):
            write_tiny_model(models, "tiny", str(successor))
            newest = successor
            await change(client, LOAD)
            oldest = successor  # for what is asked from here on
            while str(successor) not in answered:
                await asyncio.sleep(0)
            os.truncate(models / "tiny" / str(successor - 1) / "encoder.onnx", 10)
            if successor % 2:
                shutil.rmtree(models / "tiny" / str(successor - 1))
                await change(client, LOAD)
            else:
                await change(client, UNLOAD, str(successor - 1))
                shutil.rmtree(models / "tiny" / str(successor - 1))
        stopped = True
    assert set(answered) >= {"1", "2", "3", "4", "5", "6"}


PNG = encode(image_of(4))
ENCODED = b'{"image": "%s"}' % base64_text(PNG).encode()
TENSOR = {"name": "images", "datatype": "UINT8", "shape": [1, 28, 28], "data": image_of(4).ravel().tolist()}


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "kind", "body"),
    [
        ("/predict", b"image/png", PNG),
        ("/reconstruct", b"application/json", ENCODED),
        ("/reconstruct/sweep", b"application/json", ENCODED),
        ("/v2/models/tiny-encoder/infer", b"application/json", json.dumps({"inputs": [TENSOR]}).encode()),
    ],
    ids=["predict", "reconstruct", "sweep", "infer"],
)
async def test_a_request_whose_body_is_still_arriving_keeps_its_version(
    models: Path, path: str, kind: bytes, body: bytes
) -> None:
    """It was accepted for the version that was the newest; that one is retired only after its answer."""
    write_tiny_model(models, "tiny", "2")
    rest = asyncio.Event()
    begun = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield body[:20]
        begun.set()
        await rest.wait()
        yield body[20:]

    # The client's own ASGI transport reads a body whole before it calls the application.
    async def receive() -> dict[str, Any]:
        chunk = await anext(chunks, None)
        if chunk is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": chunk, "more_body": chunk != body[20:]}

    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    chunks = slowly()
    app = create_app(
        Settings.model_validate(
            {"models": models, "device": "cpu", "default_model": "tiny", "repository": True}
        )
    )
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", kind)],
        "http_version": "1.1",
        "scheme": "http",
        "app": app,
    }
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    async with (
        asyncio.timeout(LIMIT),
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        request = asyncio.create_task(app(scope, receive, send))
        await begun.wait()
        retiring = asyncio.create_task(change(client, UNLOAD, "2"))
        while len((await client.get("/models")).json()["models"]) == 2:
            await asyncio.sleep(0)
        await asyncio.wait({retiring}, timeout=0.2)
        assert not retiring.done()
        rest.set()
        await request
        await retiring
    assert sent[0]["status"] == 200
    assert b'version":"2"' in sent[1]["body"]
