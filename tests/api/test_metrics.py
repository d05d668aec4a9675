"""What /metrics counts, and that it stays right when several processes serve."""

import os
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from tests.api.conftest import Serve
from tests.support.encoded import encode, npy
from tests.support.figures import Figures, figures, value
from tests.support.process import served
from tests.support.tiny_model import image_of

PNG = encode(image_of(3))
IMAGE = {"content-type": "image/png"}
NPY = {"content-type": "application/x-npy"}
ENCODER = {"model": "tiny", "version": "2", "queue": "encoder"}


def scrape(client: TestClient) -> Figures:
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return figures(answer.text)


def test_requests_are_counted_by_route_and_status(serve: Serve) -> None:
    """Each request counts once under its route's template, with the status that it got."""
    client = serve()
    for body in (PNG, PNG, b"no image"):
        client.post("/predict", content=body, headers=IMAGE)
    client.get("/predict")
    found = scrape(client)
    assert value(found, "capsnet_requests_total", route="/predict", status="200") == 2
    assert value(found, "capsnet_requests_total", route="/predict", status="422") == 1
    assert value(found, "capsnet_requests_total", route="/predict", status="405") == 1
    assert value(found, "capsnet_request_duration_seconds_count", route="/predict") == 4
    assert value(found, "capsnet_requests_in_flight") == 1  # the scrape itself


def test_callers_cannot_make_up_labels(serve: Serve) -> None:
    """All unknown paths are one route, and all unknown models none."""
    client = serve()
    client.get("/a")
    client.get("/openapi.json")  # is there
    before = scrape(client).keys()
    for number in range(20):
        client.get(f"/unknown/{number}")
        client.post(f"/predict?model=m{number}", content=PNG, headers=IMAGE)
    after = scrape(client)
    assert value(after, "capsnet_requests_total", route="none", status="404") == 21
    assert {name for name, _ in after.keys() - before} <= {
        "capsnet_requests_total",
        "capsnet_requests_created",
        "capsnet_request_duration_seconds_bucket",
        "capsnet_request_duration_seconds_sum",
        "capsnet_request_duration_seconds_count",
        "capsnet_request_duration_seconds_created",
    }
    routes = {dict(labels)["route"] for name, labels in after if name == "capsnet_requests_total"}
    assert routes == {"none", "/predict", "/metrics", "/openapi.json"}


def test_stages_are_measured(serve: Serve) -> None:
    """A batch counts once with its rows, each item once in the queue, each image decoding once."""
    client = serve(max_batch=4)
    client.post("/predict", content=PNG, headers=IMAGE)
    client.post("/predict", content=npy(image_of(0)[None].repeat(6, 0)), headers=NPY)  # batches of 4 and 2
    found = scrape(client)
    assert value(found, "capsnet_batch_size_count", **ENCODER) == 3
    assert value(found, "capsnet_batch_size_sum", **ENCODER) == 7
    assert value(found, "capsnet_queue_duration_seconds_count", **ENCODER) == 2
    assert value(found, "capsnet_queue_depth", **ENCODER) == 0
    for graph in ("encoder", "decoder"):
        assert value(found, "capsnet_inference_duration_seconds_count", **ENCODER, graph=graph) == 3
    assert value(found, "capsnet_image_decode_duration_seconds_count") == 1


def test_failed_batches_are_counted(serve: Serve) -> None:
    """A batch that fails counts once more, as a failure, however many rows it had."""
    client = serve()
    encoder = client.app.state.service.engine.default._encoder  # type: ignore[attr-defined] # typed as any ASGI callable
    encoder._run = lambda _: 1 / 0
    answer = client.post("/predict", content=npy(image_of(0)[None].repeat(3, 0)), headers=NPY)
    assert answer.status_code == 500
    found = scrape(client)
    assert value(found, "capsnet_batch_failures_total", **ENCODER) == 1
    assert value(found, "capsnet_batch_size_count", **ENCODER) == 1


def test_what_runs_is_told(serve: Serve) -> None:
    """Model, device, precision and build are labels, and the process's own figures are there."""
    found = scrape(serve(threads=1))
    runs = {"device": "cpu", "precision": "fp32", "threads": "1"}
    assert value(found, "capsnet_model_info", model="colour", version="1", **runs) == 1
    assert any(name == "capsnet_build_info" for name, _ in found)
    assert value(found, "process_resident_memory_bytes") > 0
    assert any(name == "python_info" for name, _ in found)


def test_openmetrics_is_offered(client: TestClient) -> None:
    """A scraper that accepts OpenMetrics gets it."""
    answer = client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


@pytest.mark.parametrize("version", ["x", "1.x", "2.x", "", ".", "1..0", "\u00b2", "1" * 5000, '"1.0.0"'])
@pytest.mark.parametrize("media_type", ["application/openmetrics-text", "text/plain"])
def test_a_version_that_is_none_is_answered_in_plain_text(
    client: TestClient, media_type: str, version: str
) -> None:
    """Whatever a scraper accepts, it gets figures."""
    accept = f"{media_type}; version={version}".encode()
    answer = client.get("/metrics", headers=[(b"accept", accept)])
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    assert "capsnet_build_info" in answer.text


def test_two_applications_count_apart(serve: Serve) -> None:
    """Each application has figures of its own."""
    first, second = serve(), serve()
    first.post("/predict", content=PNG, headers=IMAGE)
    assert ("capsnet_requests_total", frozenset({("route", "/predict"), ("status", "200")})) not in scrape(
        second
    )


def test_processes_that_share_a_folder_answer_for_all(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With PROMETHEUS_MULTIPROC_DIR each process tells the sum, and the figures of each by pid."""
    monkeypatch.setitem(os.environ, "PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    with served(tiny_models) as first, served(tiny_models) as second:
        first.predict()
        second.predict()
        second.predict()
        # A request is counted after its last byte, but before the next one on its connection: so the process
        # that was asked last is the first to be asked again.
        for service in (second, first):
            found = figures(service.client.get("/metrics").text)
            assert value(found, "capsnet_requests_total", route="/predict", status="200") == 3
            assert value(found, "capsnet_batch_size_sum", **ENCODER) == 3
            assert value(found, "capsnet_queue_depth", **ENCODER) == 0
            assert value(found, "capsnet_requests_in_flight") == 1  # the scrape itself
            assert any(name == "python_info" for name, _ in found)
            for process in (first.process, second.process):
                assert value(found, "process_resident_memory_bytes", pid=str(process.pid)) > 0
