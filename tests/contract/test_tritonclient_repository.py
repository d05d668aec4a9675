"""Stock clients load and retire versions, over HTTP and over gRPC, in the real process."""

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient import grpc, http
from tritonclient.grpc import service_pb2
from tritonclient.http import aio
from tritonclient.utils import InferenceServerException

from tests.support.process import LIMIT, Served, served
from tests.support.tiny_model import image_of, write_tiny_model

Client = Any  # http.InferenceServerClient or grpc.InferenceServerClient, which come without types


@pytest.fixture
def models(tmp_path: Path) -> Path:
    write_tiny_model(tmp_path / "models", "tiny", "1")
    return tmp_path / "models"


@pytest.fixture
def process(models: Path) -> Iterator[Served]:
    with served(models, grpc_port="0", repository="true") as started:
        yield started


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest, process: Served) -> Iterator[Client]:
    if request.param == "http":
        with http.InferenceServerClient(f"127.0.0.1:{process.port}") as over_http:
            yield over_http
    else:
        with grpc.InferenceServerClient(process.grpc_address) as over_grpc:
            yield over_grpc


def index(client: Client) -> list[tuple[str, str, str]]:
    """Name, version and state of everything in the index."""
    found = client.get_model_repository_index()
    if isinstance(client, grpc.InferenceServerClient):
        return [(model.name, model.version, model.state) for model in found.models]
    return [(model["name"], model["version"], model["state"]) for model in found]


def extensions(client: Client) -> list[str]:
    metadata = client.get_server_metadata()
    return list(metadata["extensions"] if isinstance(metadata, dict) else metadata.extensions)


def test_a_version_is_replaced_with_nothing_but_the_folder_and_load(client: Client, models: Path) -> None:
    """What Triton's client can say is enough: load what is new, and retire what has left the folder."""
    assert "model_repository" in extensions(client)
    write_tiny_model(models, "tiny", "2")
    assert ("tiny-encoder", "2", "UNAVAILABLE") in index(client)
    client.load_model("tiny-encoder")
    assert index(client) == [
        ("tiny-encoder", "2", "READY"),
        ("tiny-encoder", "1", "READY"),
        ("tiny-decoder", "2", "READY"),
        ("tiny-decoder", "1", "READY"),
    ]
    assert client.is_model_ready("tiny-decoder", "2")
    shutil.rmtree(models / "tiny" / "1")
    client.load_model("tiny-decoder")
    assert index(client) == [("tiny-encoder", "2", "READY"), ("tiny-decoder", "2", "READY")]


def test_a_model_is_unloaded_with_both_its_graphs(client: Client, models: Path) -> None:
    """The default model is not: the error says what is expected."""
    write_tiny_model(models, "colour", "1", channels=3)
    client.load_model("colour-encoder")
    assert client.is_model_ready("colour-decoder")
    client.unload_model("colour-decoder", unload_dependents=True)
    client.unload_model("colour-encoder")
    assert ("colour-encoder", "1", "UNAVAILABLE") in index(client)
    with pytest.raises(InferenceServerException, match="one version must stay") as refused:
        client.unload_model("tiny-encoder")
    assert refused.value.status() in ("400", "StatusCode.FAILED_PRECONDITION")
    assert client.is_model_ready("tiny-encoder")


def test_what_cannot_be_loaded_is_said(client: Client, models: Path) -> None:
    """A broken version, an unknown name and parameters that are not served, each in words."""
    (write_tiny_model(models, "tiny", "2") / "decoder.onnx").unlink()
    for arguments, words in (
        ({"model_name": "tiny-encoder"}, "tiny/2/decoder.onnx: missing"),
        ({"model_name": "none-encoder"}, "expected one of tiny-decoder, tiny-encoder"),
        ({"model_name": "tiny-encoder", "config": "{}"}, "received config, expected version"),
    ):
        with pytest.raises(InferenceServerException) as refused:
            client.load_model(**arguments)
        assert words in refused.value.message()
        assert str(models.parent) not in refused.value.message()
    assert ("tiny-encoder", "1", "READY") in index(client)


def test_grpc_takes_the_version_and_ready_as_the_protocol_has_them(process: Served, models: Path) -> None:
    """As typed parameters; a parameter without a value and a named repository are refused."""
    write_tiny_model(models, "tiny", "2")
    write_tiny_model(models, "tiny", "3")
    with grpc.InferenceServerClient(process.grpc_address) as client:
        stub = client._client_stub
        request = service_pb2.RepositoryModelLoadRequest(model_name="tiny-encoder")
        request.parameters["version"].string_param = "3"
        stub.RepositoryModelLoad(request)
        ready = stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(ready=True)).models
        assert [(model.version, model.state) for model in ready] == [("3", "READY"), ("1", "READY")] * 2
        empty = service_pb2.RepositoryModelUnloadRequest(model_name="tiny-encoder")
        empty.parameters["version"].SetInParent()
        named = service_pb2.RepositoryModelLoadRequest(model_name="tiny-encoder", repository_name="other")
        for call, refused in ((stub.RepositoryModelUnload, empty), (stub.RepositoryModelLoad, named)):
            with pytest.raises(Exception, match="INVALID_ARGUMENT"):
                call(refused)


@pytest.mark.anyio
async def test_the_asyncio_client_does_the_same(process: Served, models: Path) -> None:
    """Index, load and unload."""
    write_tiny_model(models, "colour", "1", channels=3)
    async with aio.InferenceServerClient(f"127.0.0.1:{process.port}") as client:
        await client.load_model("colour-encoder")
        assert await client.is_model_ready("colour-decoder")
        await client.unload_model("colour-encoder")
        found = await client.get_model_repository_index()
        assert {entry["reason"] for entry in found if entry["name"] == "colour-encoder"} == {"unloaded"}


def test_grpc_calls_are_all_answered_while_versions_change(process: Served, models: Path) -> None:
    """Under continuous load every call ends well, with the right answer."""
    address = process.grpc_address
    stop = threading.Event()
    answered: list[tuple[str, int]] = []
    failures: list[BaseException] = []

    def ask(label: int) -> None:
        given = grpc.InferInput("images", [1, 28, 28], "UINT8")
        given.set_data_from_numpy(image_of(label)[np.newaxis])
        with grpc.InferenceServerClient(address) as client:
            while not stop.is_set():
                try:
                    found = client.infer("tiny-encoder", [given], client_timeout=LIMIT)
                except InferenceServerException as error:
                    failures.append(error)
                    return
                lengths = found.as_numpy("capsule_lengths")
                answered.append((found.get_response().model_version, int(lengths.argmax()) - label))

    threads = [threading.Thread(target=ask, args=(label,)) for label in range(3)]
    for thread in threads:
        thread.start()
    try:
        with grpc.InferenceServerClient(address) as client:
            for successor in range(2, 5):
                write_tiny_model(models, "tiny", str(successor))
                client.load_model("tiny-encoder")
                shutil.rmtree(models / "tiny" / str(successor - 1))
                client.load_model("tiny-encoder")
                deadline = time.monotonic() + LIMIT
                while (str(successor), 0) not in answered and time.monotonic() < deadline:
                    time.sleep(0.01)
    finally:
        stop.set()
        for thread in threads:
            thread.join(LIMIT)
    assert failures == []
    assert {version for version, _ in answered} == {"1", "2", "3", "4"}
    assert {difference for _, difference in answered} == {0}
