"""Traces reach a collector over OTLP, where one is named, and only there."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from tests.support.encoded import base64_text
from tests.support.process import IMAGE, LIMIT, PNG, Served, served
from tests.support.tiny_model import SIDE, image_of

TRACE = "0af7651916cd43dd8448eb211c80319c"  # W3C Trace Context's own example
PARENT = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


class Collector:
    """A loopback address that takes OTLP, and what it took."""

    def __init__(self) -> None:
        self.paths: set[str] = set()
        self.spans: list[Span] = []
        self.services: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.take(self.path, body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def take(self, path: str, body: bytes) -> None:
        self.paths.add(path)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            names = (item for item in resource.resource.attributes if item.key == "service.name")
            self.services |= {item.value.string_value for item in names}
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    thread = threading.Thread(target=collector.server.serve_forever)
    thread.start()
    yield collector
    collector.server.shutdown()
    thread.join()
    collector.server.server_close()


def stop(service: Served) -> None:
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(LIMIT) == 0


def test_a_request_is_one_trace_from_its_caller_to_the_graphs(
    tiny_models: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller's traceparent is taken up, each stage is a child of the request, the log names the trace."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    with served(tiny_models, log_format="json", access_log="true") as service:
        headers = {**IMAGE, "traceparent": TRACEPARENT, "x-request-id": "mine"}
        assert service.client.post("/predict", content=PNG, headers=headers).status_code == 200
        stop(service)
    assert collector.paths == {"/v1/traces"}
    assert collector.services == {"capsnet"}
    spans = {span.name: span for span in collector.spans}
    assert set(spans) == {"POST /predict", "image_decode", "queue", "encoder", "decoder"}
    request = spans.pop("POST /predict")
    assert request.parent_span_id.hex() == PARENT
    assert request.kind == Span.SPAN_KIND_SERVER
    attributes = {item.key: item.value for item in request.attributes}
    assert attributes["capsnet.request_id"].string_value == "mine"
    assert attributes["http.response.status_code"].int_value == 200
    for stage in spans.values():
        assert stage.trace_id.hex() == request.trace_id.hex() == TRACE
        assert stage.parent_span_id == request.span_id
        assert stage.start_time_unix_nano <= stage.end_time_unix_nano
    order = ["image_decode", "queue", "encoder", "decoder"]
    assert sorted(spans, key=lambda name: spans[name].start_time_unix_nano) == order
    access = [entry for line in service.log if (entry := json.loads(line))["logger"] == "service.access"]
    assert [(entry["request_id"], entry["trace_id"]) for entry in access] == [("mine", TRACE)]


def test_a_reconstruction_has_its_own_turn_in_the_trace(
    tiny_models: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that is encoded and then drawn with a tweak goes through two queues."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{collector.url}/elsewhere")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    with served(tiny_models) as service:
        assert service.client.post("/reconstruct", json={"image": base64_text(PNG)}).status_code == 200
        stop(service)
    assert collector.paths == {"/elsewhere"}
    assert collector.services == {"mine"}
    names = [span.name for span in sorted(collector.spans, key=lambda span: span.start_time_unix_nano)]
    assert names == ["POST /reconstruct", "image_decode", "queue", "encoder", "decoder", "queue", "decoder"]


def test_a_grpc_method_is_a_trace_as_well(
    tiny_models: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metadata's traceparent is taken up, and the stages are the method's children."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    with served(tiny_models, grpc_port="0") as service:
        image = grpc.InferInput("images", [1, SIDE, SIDE], "UINT8")
        image.set_data_from_numpy(image_of(3)[np.newaxis])
        with grpc.InferenceServerClient(service.grpc_address) as client:
            client.infer("tiny-encoder", [image], headers={"traceparent": TRACEPARENT})
        stop(service)
    spans = {span.name: span for span in collector.spans}
    method = spans.pop("inference.GRPCInferenceService/ModelInfer")
    assert method.trace_id.hex() == TRACE
    assert method.parent_span_id.hex() == PARENT
    assert set(spans) == {"queue", "encoder"}
    assert {span.parent_span_id for span in spans.values()} == {method.span_id}


def test_a_failed_grpc_method_says_so_in_its_trace(
    tiny_models: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its span has gRPC's number for how it ended, and is an error where the service is at fault."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    with served(tiny_models, grpc_port="0", request_timeout="0.00001") as service:
        image = grpc.InferInput("images", [1, SIDE, SIDE], "UINT8")
        image.set_data_from_numpy(image_of(3)[np.newaxis])
        with grpc.InferenceServerClient(service.grpc_address) as client:
            client.is_server_live()
            with pytest.raises(InferenceServerException):
                client.get_model_metadata("nobody")
            with pytest.raises(InferenceServerException):
                client.infer("tiny-encoder", [image])
        stop(service)
    ended = {
        span.name.rpartition("/")[2]: (
            next(item.value.int_value for item in span.attributes if item.key == "rpc.grpc.status_code"),
            span.status.code,
        )
        for span in collector.spans
        if span.kind == Span.SPAN_KIND_SERVER
    }
    assert ended == {
        "ServerLive": (0, Status.STATUS_CODE_UNSET),
        "ModelMetadata": (5, Status.STATUS_CODE_UNSET),  # NOT_FOUND
        "ModelInfer": (4, Status.STATUS_CODE_ERROR),  # DEADLINE_EXCEEDED
    }


def test_a_collector_that_is_not_there_costs_no_answer_and_no_exit(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests are answered and the process stops cleanly while nobody takes its spans."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")  # discard: nobody listens
    with served(tiny_models) as service:
        assert service.predict() == "3"
        stop(service)


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("OTEL_SDK_DISABLED", "true", ""),
        ("OTEL_TRACES_EXPORTER", "none", ""),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "no traces: OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'"),
    ],
)
def test_the_standards_ways_to_switch_it_off_work(
    tiny_models: Path,
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    says: str,
) -> None:
    """The service starts without traces, with a warning where they were asked for in another way."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv(variable, value)
    with served(tiny_models) as service:
        assert service.predict() == "3"
        stop(service)
        assert says in "".join(service.log)
    assert collector.spans == []


def test_nothing_of_the_sdk_is_imported_without_a_collector(tiny_models: Path) -> None:
    """Neither SDK nor exporter is loaded; the bare API comes with FastAPI."""
    code = f"""
import sys
from pathlib import Path
from service.app import create_app
from service.settings import Settings
create_app(Settings(models=Path({str(tiny_models)!r})))
print(*[name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))])
"""
    ended = subprocess.run(  # noqa: S603 # our own interpreter
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == ""
