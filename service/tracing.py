"""OpenTelemetry traces, where the environment names a collector; otherwise nothing of the SDK is imported.

FastAPI opens and ends the span of an HTTP request. The stages that are measured for `Server-Timing` become
its children. See docs/decisions/0018.
"""

import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from service.context import Stage, trace_id

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

logger = logging.getLogger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_HTTP = "http/protobuf"

# Time to hand over the last spans. An exit waits for no collector; what is left then is lost.
_FLUSH = 2.0  # seconds


def open_tracing() -> "Tracing | None":
    """Tracing as OpenTelemetry's own variables say; None without an endpoint.

    These variables are often set for everything that runs somewhere, so what they ask for beyond our means
    is a warning and not a failed start.
    """
    if not _variable(_ENDPOINTS) or "none" in os.environ.get("OTEL_TRACES_EXPORTER", "").split(","):
        return None
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    protocol = _variable(_PROTOCOLS) or _HTTP
    if protocol != _HTTP:
        logger.warning("no traces: OTEL_EXPORTER_OTLP_PROTOCOL is %r, expected %r", protocol, _HTTP)
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415 # an optional extra
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 # the same
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415 # the same
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415 # the same
    except ModuleNotFoundError as error:
        logger.warning("no traces: %s is not installed; install the extra `otel`", error.name)
        return None
    resource = Resource.create({"service.version": version("capsnet")})
    # The SDK's name where none is given, by OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES.
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "capsnet"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # `close` does that, within limits
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)


def _variable(names: Iterable[str]) -> str:
    return next(filter(None, map(os.environ.get, names)), "")


class Tracing:
    """Spans beside those that FastAPI makes."""

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry import propagate, trace  # noqa: PLC0415 # nobody else needs it

        self.provider = provider
        self._api = trace
        self._extract = propagate.extract
        self._tracer = provider.get_tracer("capsnet", version("capsnet"))

    def begin(self, request_id: str) -> None:
        """Tie the current request's span, its id and its log lines to each other."""
        self._tie(self._api.get_current_span(), request_id)

    @contextmanager
    def rpc(self, method: str, metadata: Mapping[str, str], request_id: str) -> Iterator["Span"]:
        """The span of a gRPC method `/service/name`, a child of the caller's where the metadata name one."""
        service, _, name = method.strip("/").rpartition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
        with self._tracer.start_as_current_span(
            method.strip("/"),
            context=self._extract(metadata),
            kind=self._api.SpanKind.SERVER,
            attributes=attributes,
        ) as span:
            self._tie(span, request_id)
            yield span

    def end_rpc(self, code: int, *, failed: bool) -> None:
        """Say in the current span how its gRPC method ended, by gRPC's number."""
        span = self._api.get_current_span()
        span.set_attribute("rpc.grpc.status_code", code)
        if failed:
            span.set_status(self._api.StatusCode.ERROR)

    def _tie(self, span: "Span", request_id: str) -> None:
        span.set_attribute("capsnet.request_id", request_id)
        trace_id.set(self._api.format_trace_id(span.get_span_context().trace_id))

    def add_stages(self, stages: Iterable[Stage]) -> None:
        """Children of the current span, as they were measured."""
        epoch = time.time_ns() - time.perf_counter_ns()  # of perf_counter
        for stage in stages:
            span = self._tracer.start_span(stage.name, start_time=epoch + round(stage.started * 1e9))
            span.end(epoch + round(stage.ended * 1e9))

    def close(self) -> None:
        """Hand over what is left; blocks, but not for long."""
        # A daemon, because a collector that does not answer must not hold up the exit of the process either.
        closing = threading.Thread(target=self.provider.shutdown, name="otel-shutdown", daemon=True)
        closing.start()
        closing.join(_FLUSH)
