"""The Open Inference Protocol's routes at their edges, which no well-behaved client reaches."""

import json
import threading
import zlib
from collections.abc import Mapping
from typing import Any

import httpx2
import numpy as np
import orjson
import pytest
from starlette.testclient import TestClient

from service.batching import Arrays
from tests.api.conftest import Serve
from tests.support.encoded import gzipped
from tests.support.tiny_model import CLASSES, DIMENSIONS, SIDE, image_of

ENCODER = "/v2/models/tiny-encoder/infer"
DECODER = "/v2/models/tiny-decoder/infer"
IMAGES = {"name": "images", "datatype": "UINT8", "shape": [1, SIDE, SIDE]}
RAW = image_of(6).tobytes()
BINARY = {**IMAGES, "parameters": {"binary_data_size": len(RAW)}}
NUMBERS = {**IMAGES, "data": image_of(6).ravel().tolist()}
LENGTHS = {"name": "capsule_lengths"}


def ask(*inputs: Mapping[str, Any], **fields: Any) -> bytes:
    return orjson.dumps({"inputs": inputs, **fields})


def post_binary(client: TestClient, text: bytes, raw: bytes, **headers: str) -> httpx2.Response:
    return client.post(
        ENCODER,
        content=text + raw,
        headers={"Inference-Header-Content-Length": str(len(text)), **headers},
    )


def error(answer: httpx2.Response, status: int) -> str:
    """The words of an answer that must be the protocol's error object and say nothing of our insides."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    document = answer.json()
    assert list(document) == ["error"]
    assert "Traceback" not in answer.text
    assert "/service/" not in answer.text
    return str(document["error"])


def lengths(answer: httpx2.Response) -> list[float]:
    assert answer.status_code == 200, answer.text
    document = answer.json()
    (found,) = (output for output in document["outputs"] if output["name"] == "capsule_lengths")
    return list(found["data"])


def test_plain_json_needs_no_header_and_no_client(client: TestClient) -> None:
    """What `curl` sends is answered in JSON, flat, with every output; there is no id unless one is given."""
    answer = client.post(ENCODER, content=ask(NUMBERS))
    assert int(np.argmax(lengths(answer))) == 6
    document = answer.json()
    assert list(document) == ["model_name", "model_version", "outputs"]
    assert client.post(ENCODER, content=ask(NUMBERS, id="")).json()["id"] == ""
    assert [output["shape"] for output in document["outputs"]] == [[1, CLASSES, DIMENSIONS], [1, CLASSES]]
    assert len(document["outputs"][0]["data"]) == CLASSES * DIMENSIONS


def test_an_output_may_overrule_the_request(client: TestClient) -> None:
    """`binary_data` of an output counts for more than `binary_data_output` of the request."""
    outputs = [{"name": "capsule_lengths", "parameters": {"binary_data": False}}, {"name": "digit_capsules"}]
    answer = post_binary(client, ask(BINARY, outputs=outputs, parameters={"binary_data_output": True}), RAW)
    assert answer.headers["content-type"] == "application/octet-stream"
    size = int(answer.headers["inference-header-content-length"])
    document = json.loads(answer.content[:size])
    assert "data" in document["outputs"][0]
    assert document["outputs"][1]["parameters"] == {"binary_data_size": 4 * CLASSES * DIMENSIONS}
    assert len(answer.content) == size + 4 * CLASSES * DIMENSIONS


def test_a_whole_number_may_have_a_decimal_point(client: TestClient) -> None:
    """JSON Schema takes 28.0 for an integer, and some languages write each number so."""
    shape = [1.0, float(SIDE), float(SIDE)]
    assert int(np.argmax(lengths(client.post(ENCODER, content=ask({**NUMBERS, "shape": shape}))))) == 6
    given = {**BINARY, "shape": shape, "parameters": {"binary_data_size": float(len(RAW))}}
    assert int(np.argmax(lengths(post_binary(client, ask(given), RAW)))) == 6


def test_unknown_fields_and_parameters_are_left_alone(client: TestClient) -> None:
    """The protocol leaves them to each server; clients send `model_name`, `content_type`, `priority`."""
    given = {**NUMBERS, "parameters": {"content_type": "np"}}
    body = ask(given, model_name="tiny-encoder", parameters={"priority": 1}, outputs=[])
    assert int(np.argmax(lengths(client.post(ENCODER, content=body)))) == 6


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "The body is not JSON"),
        (b"[]", "body: Input should be an object"),
        (ask(), "needs more inputs: received none, expected images"),
        (ask(NUMBERS, NUMBERS), "named twice"),
        (ask({**NUMBERS, "name": "x"}), "no such input: received x, expected images"),
        (ask(NUMBERS, outputs=[{"name": "x"}]), "no such output: received x, expected digit_capsules and"),
        (ask(NUMBERS, outputs=[LENGTHS] * 2), "An output is named twice"),
        (ask(NUMBERS, id=7), "body id"),
        (ask(IMAGES), "neither data nor binary_data_size"),
        (ask({**NUMBERS, **BINARY}), "data and binary_data_size"),
        (ask(BINARY), "received 0 bytes"),
        (ask({**NUMBERS, "parameters": {"binary_data_size": -1}}), "binary_data_size"),
        (ask({**NUMBERS, "parameters": {"binary_data_size": 0.5}}), "binary_data_size"),
        (ask({**NUMBERS, "data": "x"}), "body inputs.0.data"),
        (ask({**NUMBERS, "data": []}), "received 0 values, expected 784 numbers"),
        (ask({**NUMBERS, "shape": [0, 28, 28], "data": []}), "expected [-1, 28, 28]"),
        (ask({**NUMBERS, "shape": [True, 28, 28]}), "body inputs.0.shape.0"),
        (ask({**NUMBERS, "shape": [1, 28.5, 28]}), "body inputs.0.shape.1"),
        (ask({**NUMBERS, "parameters": {"shared_memory_region": "x"}}), "not served"),
        (
            ask(NUMBERS, outputs=[{"name": "capsule_lengths", "parameters": {"classification": 3}}]),
            "not served",
        ),
        (ask(NUMBERS, parameters={"binary_data_output": "yes"}), "binary_data_output"),
    ],
)
def test_a_request_at_fault_is_told_why(client: TestClient, body: bytes, words: str) -> None:
    """Each fault is a 400 with the protocol's error object."""
    assert words in error(client.post(ENCODER, content=body), 400)


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "1e39", "11", "-11", "null", '"1"', "true"]
)
def test_the_decoder_takes_only_values_that_it_can_draw(client: TestClient, value: str) -> None:
    """Numbers that would draw a reconstruction of NaN, and what is no number, are refused."""
    numbers = ",".join([value, *["0"] * (CLASSES * DIMENSIONS - 1)])
    text = (
        f'{{"inputs": [{{"name": "target", "datatype": "INT64", "shape": [1], "data": [0]}},'
        f' {{"name": "digit_capsules", "datatype": "FP32", "shape": [1, {CLASSES}, {DIMENSIONS}],'
        f' "data": [{numbers}]}}]}}'
    )
    assert "digit_capsules" in error(client.post(DECODER, content=text), 400)


@pytest.mark.parametrize("component", [-10, 10])
def test_the_decoder_takes_the_largest_tweaks(client: TestClient, component: int) -> None:
    """A capsule's components may reach the bounds, below zero as well, and the target the last class."""
    shape = [1, CLASSES, DIMENSIONS]
    data = [component] * (CLASSES * DIMENSIONS)
    capsules = {"name": "digit_capsules", "datatype": "FP32", "shape": shape, "data": data}
    target = {"name": "target", "datatype": "INT64", "shape": [1], "data": [CLASSES - 1]}
    assert client.post(DECODER, content=ask(capsules, target)).status_code == 200


@pytest.mark.parametrize(("rows", "target"), [(2, [0]), (1, [10]), (1, [-1])])
def test_targets_are_as_many_as_capsules_and_are_classes(
    client: TestClient, rows: int, target: list[int]
) -> None:
    """A target that is no class would draw nothing without a word."""
    shape = [rows, CLASSES, DIMENSIONS]
    capsules = {
        "name": "digit_capsules",
        "datatype": "FP32",
        "shape": shape,
        "data": [0] * int(np.prod(shape)),
    }
    given = {"name": "target", "datatype": "INT64", "shape": [len(target)], "data": target}
    error(client.post(DECODER, content=ask(capsules, given)), 400)


@pytest.mark.parametrize("length", ["", "x", "-1", "0", "1.5", "99999999", "9" * 5000, "²"])
def test_a_json_length_that_does_not_fit_is_refused(client: TestClient, length: str) -> None:
    """Neither texts nor lengths beyond the body lead anywhere else."""
    answer = client.post(
        ENCODER, content=ask(NUMBERS), headers={b"Inference-Header-Content-Length": length.encode("latin-1")}
    )
    assert "Inference-Header-Content-Length" in error(answer, 400)


@pytest.mark.parametrize(
    ("raw", "words"), [(RAW[:-1], "received 783 bytes"), (RAW + b"x", "received 1 bytes")]
)
def test_the_bytes_after_the_json_must_be_those_announced(client: TestClient, raw: bytes, words: str) -> None:
    """None may be missing, and none left over."""
    assert words in error(post_binary(client, ask(BINARY), raw), 400)


def test_a_size_that_does_not_match_the_shape_is_refused(client: TestClient) -> None:
    """`binary_data_size` and the shape say the same thing twice, and must agree."""
    given = {**IMAGES, "parameters": {"binary_data_size": 783}}
    assert "783 bytes, expected 784 bytes" in error(post_binary(client, ask(given), RAW[:-1]), 400)


@pytest.mark.parametrize(
    ("encoding", "body", "status", "words"),
    [
        ("gzip", gzipped(bytes(3000)), 413, "more than 2048 bytes after decompression"),
        ("deflate", zlib.compress(bytes(100_000_000)), 413, "more than"),
        ("gzip", gzipped(ask(BINARY))[:-9], 400, "an incomplete stream"),
        ("gzip", gzipped(ask(BINARY)) + b"x", 400, "bytes after the end"),
        ("gzip", b"no gzip at all", 400, "cannot be decompressed"),
        ("br", b"x", 415, "received Content-Encoding: br, expected gzip or deflate"),
        ("gzip, gzip", b"x", 415, "expected gzip or deflate"),
    ],
)
def test_compressed_bodies_are_bounded_and_whole(
    serve: Serve, encoding: str, body: bytes, status: int, words: str
) -> None:
    """A small body that inflates to a large one is refused at the limit."""
    client = serve(max_body=2048) if len(body) < 2048 else serve()
    assert words in error(client.post(ENCODER, content=body, headers={"Content-Encoding": encoding}), status)


def test_a_body_over_the_limit_is_refused(serve: Serve) -> None:
    """By its length, as everywhere."""
    assert "at most 1024 bytes" in error(serve(max_body=1024).post(ENCODER, content=bytes(1025)), 413)


def test_rows_are_limited_as_images_are(serve: Serve) -> None:
    """The last row that is taken, and one more."""
    client = serve(max_images=2)
    for rows, status in ((2, 200), (3, 413)):
        given = {**IMAGES, "shape": [rows, SIDE, SIDE], "data": [0] * (rows * SIDE * SIDE)}
        assert client.post(ENCODER, content=ask(given)).status_code == status


def test_more_values_than_json_should_carry_are_refused(client: TestClient) -> None:
    """The error names the better way."""
    body = b'{"inputs": [' + b"0," * 400_000 + b"0]}"
    assert "large arrays travel as bytes" in error(client.post(ENCODER, content=body), 413)


def test_nested_values_are_bounded_with_their_brackets(client: TestClient) -> None:
    """The largest nested tensors are taken; what is nested deeper than any tensor has too many brackets."""
    colour = np.zeros((85, 32, 32, 3), np.uint8)  # fewer than 2 ** 18 numbers, and brackets for each pixel
    given = {"name": "images", "datatype": "UINT8", "shape": colour.shape, "data": colour.tolist()}
    assert "shape" in error(client.post(ENCODER, content=ask(given)), 400)
    deep = b",".join([b"[" * 90 + b"]" * 90] * 5000)
    body = ask({**IMAGES, "data": []}).replace(b'"data":[]', b'"data":[' + deep + b"]")
    assert "too many values" in error(client.post(ENCODER, content=body), 413)


@pytest.mark.parametrize("field", ["inputs", "outputs"])
def test_there_are_few_tensors(client: TestClient, field: str) -> None:
    """Of many named ones not each becomes an object; the error says how many there may be."""
    body = {"inputs": [NUMBERS], field: [{**NUMBERS, "name": "nothing"}] * 17}
    assert "at most 16 items" in error(client.post(ENCODER, content=orjson.dumps(body)), 400)


@pytest.mark.parametrize("path", ["/v2/", "/v2/models", "/v2/models/tiny-encoder/versions/2/", "/v2/x/y"])
def test_paths_that_are_not_there_answer_in_the_protocols_form(client: TestClient, path: str) -> None:
    """404 with the error object, though no route is there to make it."""
    error(client.get(path), 404)


@pytest.mark.parametrize(
    "name", ["tiny", "encoder", "-encoder", "tiny-Encoder", "tiny-encoder-encoder", "%2e%2e"]
)
def test_names_that_are_not_served_are_404(client: TestClient, name: str) -> None:
    """Metadata, readiness and inference agree about it."""
    for path in (f"/v2/models/{name}", f"/v2/models/{name}/ready", f"/v2/models/{name}/versions/1"):
        assert "expected one of colour-decoder" in error(client.get(path), 404)
    error(client.post(f"/v2/models/{name}/infer", content=ask(NUMBERS)), 404)


@pytest.mark.parametrize("path", ["/v2/models/%s", "/v2/models/tiny-encoder/versions/%s"])
def test_an_error_repeats_little_of_a_name(client: TestClient, path: str) -> None:
    """However long a name or a version is, a hundred characters of it come back at most."""
    assert "x" * 101 not in error(client.get(path % ("x" * 999)), 404)


def test_a_wrong_method_answers_in_the_protocols_form(client: TestClient) -> None:
    """With the method that would have been right."""
    answer = client.get(ENCODER)
    assert "expected POST" in error(answer, 405)
    assert answer.headers["allow"] == "POST"


def test_a_stopping_server_is_live_but_not_ready(serve: Serve) -> None:
    """Models are as ready as the server; requests that still come are answered."""
    client = serve()
    client.app.state.service.engine.ready = False  # type: ignore[attr-defined] # an ASGI app to the test client
    assert client.get("/v2/health/live").json() == {"live": True}
    error(client.get("/v2/health/ready"), 503)
    error(client.get("/v2/models/tiny-encoder/ready"), 503)
    assert client.post(ENCODER, content=ask(NUMBERS)).status_code == 200


def test_overload_is_refused_at_once_with_a_time_to_come_back(serve: Serve) -> None:
    """The protocol's callers wait in the same queue as all others, and hear 503 when it is full."""
    client = serve(max_batch=1, queue_length=1, default_model="tiny")
    batcher = client.app.state.service.engine.default._encoder  # type: ignore[attr-defined] # as above
    go_on, running, run = threading.Event(), threading.Semaphore(0), batcher._run

    def wait_and_run(inputs: Arrays) -> Arrays:
        running.release()
        assert go_on.wait(10)
        outputs: Arrays = run(inputs)
        return outputs

    batcher._run = wait_and_run
    statuses: list[int] = []

    def post() -> None:
        statuses.append(client.post(ENCODER, content=ask(NUMBERS)).status_code)

    threads = [threading.Thread(target=post) for _ in range(2)]
    threads[0].start()
    assert running.acquire(timeout=10)
    threads[1].start()
    while batcher.depth < 1:
        threading.Event().wait(0.001)
    answer = client.post(ENCODER, content=ask(NUMBERS))
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert "rows wait for tiny/2 encoder" in error(answer, 503)
    assert int(answer.headers["retry-after"]) >= 1
    assert statuses == [200, 200]


def test_the_encoder_runs_without_the_decoder(serve: Serve) -> None:
    """Who asks for the encoder alone waits for nothing else, and does not fail with it."""
    client = serve()
    graphs = client.app.state.service.engine.default._encoder._run.__self__  # type: ignore[attr-defined] # as above
    object.__setattr__(graphs, "drawer", None)
    assert int(np.argmax(lengths(client.post(ENCODER, content=ask(NUMBERS))))) == 6


def test_a_failing_batch_is_the_services_fault(serve: Serve) -> None:
    """500 in the protocol's form, and the next request is served."""
    client = serve()
    batcher = client.app.state.service.engine.default._encoder  # type: ignore[attr-defined] # as above
    run = batcher._run
    batcher._run = lambda inputs: run(inputs[:1])
    error(client.post(ENCODER, content=ask(NUMBERS)), 500)
    batcher._run = run
    assert client.post(ENCODER, content=ask(NUMBERS)).status_code == 200
