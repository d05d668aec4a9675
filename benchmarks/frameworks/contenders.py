"""The frameworks that are compared: how each is installed, started and asked."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Body = Callable[[str], dict[str, Any]]


@dataclass(frozen=True)
class Work:
    """What each has to do."""

    encoder: Path
    decoder: Path
    expected: NDArray[np.float32]
    """Of the digit, as `Classifier.results` has it: (K + 1,)."""


@dataclass(frozen=True)
class Framework:
    """How one framework is installed, started and asked."""

    name: str
    requirements: tuple[str, ...]
    """What pip installs; the table names the version of the first."""
    command: tuple[str, ...]
    """After its environment's Python; `{port}` and `{workers}` are filled in."""
    path: str
    body: Body
    """What is sent, of the image in base64."""
    results: Callable[[Any], list[float]]
    """The lengths of the capsules in its answer, and the reconstruction's error."""
    folder: str
    """Of its environment, in `processes.ENVIRONMENTS`."""
    waits: bool = True
    """Whether it can be told how long a batch may wait for more."""


@dataclass(frozen=True)
class Setting:
    """What is tried, since no framework chooses it by itself."""

    workers: int
    threads: int
    """Of each worker's session."""
    wait_ms: int | None
    """How long a batch may wait for more; None where the framework knows no such setting."""

    def __str__(self) -> str:
        shape = f"{self.workers} x {self.threads} threads"
        return shape if self.wait_ms is None else f"{shape}, {self.wait_ms} ms"


def _one(png: str) -> dict[str, Any]:
    return {"image": png}


def several(png: str) -> dict[str, Any]:
    return {"images": [png]}


def _protocol(png: str) -> dict[str, Any]:
    """The Open Inference Protocol's."""
    return {"inputs": [{"name": "image", "shape": [1, 1], "datatype": "BYTES", "data": [png]}]}


def _script(name: str) -> tuple[str, ...]:
    return ("-m", f"benchmarks.frameworks.{name}")


def _plain(answer: Any) -> list[float]:
    return [*answer["lengths"], answer["reconstruction_error"]]


FRAMEWORKS = (
    Framework(
        "FastAPI, as in its tutorial",
        (f"fastapi=={version('fastapi')}", f"uvicorn[standard]=={version('uvicorn')}"),  # as the service has
        (
            *("-m", "uvicorn", "benchmarks.frameworks.by_fastapi:app"),
            *("--port", "{port}", "--workers", "{workers}", "--no-access-log"),
        ),
        "/predict",
        _one,
        _plain,
        "fastapi",
        waits=False,
    ),
    Framework(
        "Mosec",
        ("mosec==0.9.8",),
        (*_script("by_mosec"), "--address", "127.0.0.1", "--port", "{port}"),
        "/inference",
        _one,
        _plain,
        "mosec",
    ),
    Framework(
        "LitServe", ("litserve==0.2.19",), _script("by_litserve"), "/predict", _one, _plain, "litserve"
    ),
    Framework(
        "BentoML",
        ("bentoml==1.4.40",),
        (
            *("-m", "bentoml", "serve", "benchmarks.frameworks.by_bentoml:Capsules"),
            *("--host", "127.0.0.1", "--port", "{port}"),
        ),
        "/predict",
        several,
        lambda answer: _plain(answer[0]),
        "bentoml",
        waits=False,
    ),
    Framework(
        "MLServer",
        ("mlserver==1.7.1", "uvloop==0.21.0"),  # its workers do not start with a newer uvloop
        _script("by_mlserver"),
        "/v2/models/capsules/infer",
        _protocol,
        lambda answer: list(answer["outputs"][0]["data"]),
        "mlserver",
    ),
    Framework("Ray Serve", ("ray[serve]==2.60.0",), _script("by_ray"), "/", _one, _plain, "ray"),
    Framework(
        "Triton, through PyTriton",
        ("nvidia-pytriton==0.7.0",),
        _script("by_pytriton"),
        "/v2/models/capsules/infer",
        _protocol,
        lambda answer: list(answer["outputs"][0]["data"]),
        "nvidia-pytriton",
    ),
)
