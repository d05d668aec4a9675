"""A stock client of the Open Inference Protocol over HTTP, against the real process."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tritonclient import http
from tritonclient.http import aio
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tests.support.process import Served, served
from tests.support.tiny_model import CLASSES, DIMENSIONS, SIDE, band, capsules_of, image_of


@pytest.fixture(scope="module")
def process(tiny_models: Path) -> Iterator[Served]:
    with served(tiny_models, max_images="64") as started:
        yield started


@pytest.fixture
def client(process: Served) -> Iterator[http.InferenceServerClient]:
    with http.InferenceServerClient(f"127.0.0.1:{process.port}", concurrency=8) as opened:
        yield opened


@pytest.fixture
async def async_client(process: Served) -> AsyncIterator[aio.InferenceServerClient]:
    async with aio.InferenceServerClient(f"127.0.0.1:{process.port}") as opened:
        yield opened


def tensor(name: str, array: NDArray[Any], *, binary: bool = True) -> http.InferInput:
    given = http.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    given.set_data_from_numpy(array, binary_data=binary)
    return given


def test_the_server_introduces_itself(client: http.InferenceServerClient) -> None:
    """It is live and ready, and names the one extension that it has."""
    assert client.is_server_live()
    assert client.is_server_ready()
    metadata = client.get_server_metadata()
    assert metadata["name"] == "capsnet"
    assert metadata["extensions"] == ["binary_tensor_data"]


def test_each_graph_is_a_model_with_its_manifests_tensors(client: http.InferenceServerClient) -> None:
    """Names, versions, datatypes and shapes are there without a look into the repository."""
    assert client.get_model_metadata("tiny-encoder") == {
        "name": "tiny-encoder",
        "versions": ["2", "1"],
        "platform": "onnx_onnxv1",
        "inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, SIDE, SIDE]}],
        "outputs": [
            {"name": "digit_capsules", "datatype": "FP32", "shape": [-1, CLASSES, DIMENSIONS]},
            {"name": "capsule_lengths", "datatype": "FP32", "shape": [-1, CLASSES]},
        ],
    }
    decoder = client.get_model_metadata("colour-decoder", "1")
    assert [spec["name"] for spec in decoder["inputs"]] == ["digit_capsules", "target"]
    assert decoder["outputs"][0]["shape"] == [-1, SIDE, SIDE, 3]


def test_readiness_knows_names_and_versions(client: http.InferenceServerClient) -> None:
    """What is served is ready, with and without its version; nothing else is."""
    assert client.is_model_ready("tiny-encoder")
    assert client.is_model_ready("tiny-decoder", "1")
    assert not client.is_model_ready("tiny")
    assert not client.is_model_ready("tiny-encoder", "3")


@pytest.mark.parametrize("send_binary", [True, False])
@pytest.mark.parametrize("ask_binary", [True, False])
def test_the_encoder_tells_classes_in_json_and_in_bytes(
    client: http.InferenceServerClient, send_binary: bool, ask_binary: bool
) -> None:
    """Every combination of forms gives the same capsules; names, version and id come back."""
    images = np.stack([image_of(index) for index in (7, 0, 3)])
    result = client.infer(
        "tiny-encoder",
        [tensor("images", images, binary=send_binary)],
        outputs=[
            http.InferRequestedOutput("capsule_lengths", binary_data=ask_binary),
            http.InferRequestedOutput("digit_capsules", binary_data=ask_binary),
        ],
        request_id="seven, zero, three",
    )
    response = result.get_response()
    assert response["model_name"] == "tiny-encoder"
    assert response["model_version"] == "2"
    assert response["id"] == "seven, zero, three"
    assert [output["name"] for output in response["outputs"]] == ["capsule_lengths", "digit_capsules"]
    assert all(("parameters" in output) == ask_binary for output in response["outputs"])
    lengths = result.as_numpy("capsule_lengths")
    assert lengths.shape == (3, CLASSES)
    assert lengths.argmax(axis=1).tolist() == [7, 0, 3]
    capsules = result.as_numpy("digit_capsules")
    assert capsules.dtype == np.float32
    np.testing.assert_array_equal(capsules[:, :, 0], lengths)


def test_forms_may_be_mixed_in_one_answer(client: http.InferenceServerClient) -> None:
    """One output as bytes beside another as JSON."""
    result = client.infer(
        "tiny-encoder",
        [tensor("images", image_of(5)[np.newaxis])],
        outputs=[
            http.InferRequestedOutput("digit_capsules", binary_data=True),
            http.InferRequestedOutput("capsule_lengths", binary_data=False),
        ],
    )
    np.testing.assert_array_equal(
        result.as_numpy("digit_capsules")[:, :, 0], result.as_numpy("capsule_lengths")
    )


def test_without_requested_outputs_all_come(client: http.InferenceServerClient) -> None:
    """The client then asks for all outputs as bytes."""
    result = client.infer("tiny-encoder", [tensor("images", image_of(1)[np.newaxis])])
    assert [output["name"] for output in result.get_response()["outputs"]] == [
        "digit_capsules",
        "capsule_lengths",
    ]
    assert result.get_output("digit_capsules")["parameters"]["binary_data_size"] == 4 * CLASSES * DIMENSIONS


def test_only_requested_outputs_come(client: http.InferenceServerClient) -> None:
    """The capsules stay where they are when only their lengths are wanted."""
    result = client.infer(
        "tiny-encoder",
        [tensor("images", image_of(1)[np.newaxis])],
        outputs=[http.InferRequestedOutput("capsule_lengths")],
    )
    assert result.as_numpy("digit_capsules") is None
    assert result.as_numpy("capsule_lengths").argmax() == 1


@pytest.mark.parametrize("binary", [True, False])
def test_the_decoder_draws_the_targets(client: http.InferenceServerClient, binary: bool) -> None:
    """Each row is drawn from its own target's capsule; the inputs may come in any order."""
    inputs = [
        tensor("target", np.array([4, 9, 4], np.int64), binary=binary),
        tensor("digit_capsules", capsules_of(4, 9, 9), binary=binary),
    ]
    drawn = client.infer("tiny-decoder", inputs).as_numpy("reconstructions")
    assert drawn.shape == (3, SIDE, SIDE)
    assert drawn[0, band(4), 4:24].min() == 1
    assert drawn[1, band(9), 4:24].min() == 1
    assert drawn[2].max() == 0  # only capsule 9 is there, and it is masked


def test_a_capsule_that_one_graph_returned_can_be_given_to_the_other(
    client: http.InferenceServerClient,
) -> None:
    """Encode once, decode: the colour model's image comes back."""
    image = image_of(2, channels=3)[np.newaxis]
    encoded = client.infer("colour-encoder", [tensor("images", image)])
    inputs = [
        tensor("digit_capsules", encoded.as_numpy("digit_capsules")),
        tensor("target", encoded.as_numpy("capsule_lengths").argmax(axis=1)),
    ]
    drawn = client.infer("colour-decoder", inputs, model_version="1").as_numpy("reconstructions")
    assert drawn.shape == (1, SIDE, SIDE, 3)
    np.testing.assert_allclose(drawn * 255, image, atol=0.5)


def test_versions_are_chosen_by_the_caller(client: http.InferenceServerClient) -> None:
    """An older version answers when it is asked for, and says so."""
    for asked, answered in (("1", "1"), ("2", "2"), ("", "2")):
        result = client.infer(
            "tiny-encoder", [tensor("images", image_of(0)[np.newaxis])], model_version=asked
        )
        assert result.get_response()["model_version"] == answered


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_requests_may_be_compressed(client: http.InferenceServerClient, algorithm: str) -> None:
    """Both ways that the client has; an answer need not be compressed."""
    result = client.infer(
        "tiny-encoder",
        [tensor("images", image_of(8)[np.newaxis])],
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    assert result.as_numpy("capsule_lengths").argmax() == 8


def test_errors_reach_the_caller_in_words(client: http.InferenceServerClient) -> None:
    """The client shows the status and what was received and expected."""
    image = image_of(0)[np.newaxis]
    target = tensor("target", np.array([10], np.int64))
    capsules = tensor("digit_capsules", capsules_of(1))

    def refused(model: str, *inputs: http.InferInput) -> tuple[str, str]:
        with pytest.raises(InferenceServerException) as caught:
            client.infer(model, list(inputs))
        return caught.value.status(), caught.value.message()

    encoder, decoder = "tiny-encoder", "tiny-decoder"
    for status, words, (found_status, found_words) in (
        ("404", "received 'tiny', expected one of colour-decoder", refused("tiny", target)),
        ("400", "'FP32', expected UINT8", refused(encoder, tensor("images", image.astype(np.float32)))),
        ("400", "'FP16', expected UINT8", refused(encoder, tensor("images", image.astype(np.float16)))),
        ("400", "[1, 784], expected [-1, 28, 28]", refused(encoder, tensor("images", image.reshape(1, -1)))),
        ("400", "pixels, expected images", refused(encoder, tensor("pixels", image))),
        ("400", "target, expected digit_capsules and target", refused(decoder, target)),
        ("400", "10, expected 0 to 9", refused(decoder, target, capsules)),
        ("413", "65, expected at most 64", refused(encoder, tensor("images", image.repeat(65, axis=0)))),
    ):
        assert found_status == status
        assert words in found_words


def test_many_callers_get_their_own_answers(client: http.InferenceServerClient) -> None:
    """Requests that share batches do not share results, and each keeps its id."""

    def classes(number: int) -> list[int]:
        return [(number + row) % CLASSES for row in range(1 + number % 3)]

    pending = []
    for number in range(64):
        images = np.stack([image_of(index) for index in classes(number)])
        given = tensor("images", images, binary=number % 2 == 0)
        pending.append(client.async_infer("tiny-encoder", [given], request_id=str(number)))
    for number, request in enumerate(pending):
        result = request.get_result()
        assert result.get_response()["id"] == str(number)
        assert result.as_numpy("capsule_lengths").argmax(axis=1).tolist() == classes(number)


@pytest.mark.anyio
async def test_the_asyncio_client_does_the_same(async_client: aio.InferenceServerClient) -> None:
    """Health, metadata, inference in both forms, many at once, and errors."""
    assert await async_client.is_server_live()
    assert await async_client.is_server_ready()
    assert await async_client.is_model_ready("colour-encoder")
    assert not await async_client.is_model_ready("colour-encoder", "2")
    metadata = await async_client.get_model_metadata("tiny-decoder")
    assert metadata["versions"] == ["2", "1"]

    async def ask(number: int) -> int:
        binary = number % 2 == 0
        result = await async_client.infer(
            "tiny-encoder",
            [tensor("images", image_of(number % CLASSES)[np.newaxis], binary=binary)],
            outputs=[http.InferRequestedOutput("capsule_lengths", binary_data=binary)],
            request_id=str(number),
            request_compression_algorithm="gzip" if number % 3 == 0 else None,
        )
        assert result.get_response()["id"] == str(number)
        return int(result.as_numpy("capsule_lengths").argmax())

    found = await asyncio.gather(*(ask(number) for number in range(64)))
    assert found == [number % CLASSES for number in range(64)]
    with pytest.raises(InferenceServerException) as caught:
        await async_client.infer("tiny-encoder", [])
    assert caught.value.status() == "400"
