"""What Prometheus may ask: every metric of the service, defined in one place.

Each application has a registry of its own. Where PROMETHEUS_MULTIPROC_DIR is set before the start, as
prometheus_client defines it, all processes that share the folder answer with the figures of all of them.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    values,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from service.context import Stage
from service.errors import StartError
from service.handover import PLACE

# From a lone small request on a GPU to the default time limit of a request.
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)

_QUEUE = ("model", "version", "queue")

# The graphs that each queue's batches run through; what was encoded is decoded as well (decision 11). Where
# the encoder's graph draws (decision 42) it is one run, and the decoder's figures are of its own queue alone.
_GRAPHS = {"encoder": ("encoder", "decoder"), "decoder": ("decoder",)}


# prometheus_client compares a version with numbers, whatever it is.
_ODD_VERSION = re.compile(r"version=(?!\d{1,9}(\.\d{1,9})*\s*([;,]|$))")


def _count_on(place: str) -> None:
    """Have this process count on in the files of those that had its place before; gauges are its own.

    With files of each process's own, a folder in memory would fill with those of the dead.
    """
    of_process = values.ValueClass
    of_place = values.MultiProcessValue(lambda: place)  # type: ignore[no-untyped-call] # theirs

    def value(kind: str, *arguments: Any, **options: Any) -> Any:
        return (of_process if kind == "gauge" else of_place)(kind, *arguments, **options)

    values.ValueClass = value


if _place := os.environ.get(PLACE):  # before any metric is made, which settles where it counts
    _count_on(_place)


class Metrics:
    """The metrics of one application, and of the processes that share its multiprocess folder.

    Raises:
        StartError: the multiprocess folder cannot be used.
    """

    def __init__(self) -> None:
        folder = self._multiprocess_folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        if folder is not None and not (Path(folder).is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            raise StartError(f"PROMETHEUS_MULTIPROC_DIR: {folder!r} is no folder that can be written to")
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "capsnet_requests",
            "Requests by route, and by HTTP status or how else they ended.",
            ("route", "status"),
            registry=registry,
        )
        self._request_seconds = Histogram(
            "capsnet_request_duration_seconds",
            "From a request's head to the last byte of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge(
            "capsnet_requests_in_flight",
            "Requests that have no answer yet.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.image_decode_seconds = Histogram(
            "capsnet_image_decode_duration_seconds",
            "Decoding and preprocessing all images of a request, the wait for a thread included.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._queue_seconds = Histogram(
            "capsnet_queue_duration_seconds",
            "From admission to the batch that takes an item's first rows.",
            _QUEUE,
            buckets=_SECONDS,
            registry=registry,
        )
        self._queue_depth = Gauge(
            "capsnet_queue_depth",
            "Rows that wait for the device.",
            _QUEUE,
            multiprocess_mode="livesum",
            registry=registry,
        )
        self._batch_rows = Histogram(
            "capsnet_batch_size", "Rows of a batch.", _QUEUE, buckets=_ROWS, registry=registry
        )
        self._batch_failures = Counter(
            "capsnet_batch_failures", "Batches that failed.", _QUEUE, registry=registry
        )
        self._inference_seconds = Histogram(
            "capsnet_inference_duration_seconds",
            "One run of a graph on one batch.",
            ("model", "version", "queue", "graph"),
            buckets=_SECONDS,
            registry=registry,
        )
        self._model_info = Gauge(
            "capsnet_model_info",
            "1 for each model version that is served.",
            ("model", "version", "device", "precision", "threads"),
            multiprocess_mode="livemax",
            registry=registry,
        )
        self._build_info = Gauge(
            "capsnet_build_info",
            "1; the labels say what runs.",
            ("version", "onnxruntime"),
            multiprocess_mode="livemax",
            registry=registry,
        )
        # Looked up once: a look-up costs as much as an observation.
        self._ended: dict[tuple[str, str], tuple[Counter, Histogram]] = {}
        PlatformCollector(registry)
        if self._multiprocess_folder is None:
            ProcessCollector(registry=registry)
            GCCollector(registry)

    def request_ended(self, route: str, status: str, seconds: float) -> None:
        """Count a request.

        Args:
            status: HTTP's or gRPC's, or how else it ended.
            seconds: that it took.
        """
        metrics = self._ended.get((route, status))
        if metrics is None:
            metrics = self.requests.labels(route, status), self._request_seconds.labels(route)
            self._ended[route, status] = metrics
        count, duration = metrics
        count.inc()
        duration.observe(seconds)

    def queue(self, model: str, version: str, queue: str) -> "QueueMetrics":
        """The metrics of one batcher."""
        return QueueMetrics(
            seconds=self._queue_seconds.labels(model, version, queue),
            depth=self._queue_depth.labels(model, version, queue),
            rows=self._batch_rows.labels(model, version, queue),
            failures=self._batch_failures.labels(model, version, queue),
            graphs={
                graph: self._inference_seconds.labels(model, version, queue, graph)
                for graph in _GRAPHS[queue]
            },
        )

    def build(self, version: str, onnxruntime: str) -> None:
        """State what runs."""
        self._build_info.labels(version, onnxruntime).set(1)

    def model(self, model: str, version: str, device: str, precision: str, threads: int) -> None:
        """State that a model version is served."""
        self._model_info.labels(model, version, device, precision, str(threads)).set(1)

    def forget(self, model: str, version: str, device: str, precision: str, threads: int) -> None:
        """Drop every figure of a model version that is no longer served.

        prometheus_client cannot drop any in a multiprocess folder: there the last ones stay, beside a 0.
        """
        if self._multiprocess_folder is not None:
            self._model_info.labels(model, version, device, precision, str(threads)).set(0)
            return
        self._model_info.remove(model, version, device, precision, str(threads))
        for queue, graphs in _GRAPHS.items():
            for metric in (self._queue_seconds, self._queue_depth, self._batch_rows, self._batch_failures):
                metric.remove(model, version, queue)
            for graph in graphs:
                self._inference_seconds.remove(model, version, queue, graph)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """All figures in the form that an Accept header asks for, and its media type.

        Plain text, if a version in it is none.
        """
        encode, media_type = choose_encoder("" if _ODD_VERSION.search(accept) else accept)
        registry = self._registry
        if self._multiprocess_folder is not None:
            registry = CollectorRegistry()
            MultiProcessCollector(registry, self._multiprocess_folder)  # type: ignore[no-untyped-call] # theirs
            PlatformCollector(registry)
            registry.register(_Workers(Path(self._multiprocess_folder)))
        return encode(registry), media_type


@dataclass(frozen=True, slots=True)
class QueueMetrics:
    """The metrics of one batcher, looked up once."""

    seconds: Histogram
    depth: Gauge
    rows: Histogram
    failures: Counter
    graphs: dict[str, Histogram]

    def batch(self, rows: int, stages: Iterable[Stage]) -> None:
        """A batch of `rows` rows left for the device and went through these stages."""
        self.rows.observe(rows)
        for stage in stages:
            if stage.name in self.graphs:
                self.graphs[stage.name].observe(stage.seconds)


class _Workers(Collector):
    """Process figures of each live process that shares the multiprocess folder, by `pid`."""

    def __init__(self, folder: Path) -> None:
        # The live gauges' files are those that the supervisor removes when a process is dead.
        self._pids = sorted({int(path.stem.rpartition("_")[2]) for path in folder.glob("gauge_live*_*.db")})

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for pid in self._pids:
            for metric in ProcessCollector(pid=partial(int, pid), registry=None).collect():
                family = families.setdefault(
                    metric.name, Metric(metric.name, metric.documentation, metric.type)
                )
                for sample in metric.samples:
                    family.add_sample(sample.name, {**sample.labels, "pid": str(pid)}, sample.value)
        return iter(families.values())
