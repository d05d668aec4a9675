"""The service on a GPU, over HTTP, beside itself on the CPU. Skipped where ONNX Runtime has no CUDA."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.support.encoded import decode, decode_data_url, encode
from tests.support.mnist import ROOT
from tests.support.process import IMAGE, Served, served

pytestmark = pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="this ONNX Runtime has no CUDA: make test GPU=1 on a machine with a GPU",
)
DIGIT = (ROOT / "docs/examples/seven.png").read_bytes()
TWEAKS = '{"tweaks": [{"dimension": 5, "delta": 0.2}]}'
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-3}
"""How far a capsule or a length may be from fp32 on the CPU."""


@pytest.fixture(scope="module")
def on_cpu() -> Iterator[Served]:
    with served(ROOT / "models", device="cpu", precision="fp32", default_model="mnist") as service:
        yield service


@pytest.fixture(scope="module", params=["fp32", "fp16", "fp16 with CUDA graphs", "fp16 by two workers"])
def on_cuda(request: pytest.FixtureRequest) -> Iterator[tuple[Served, str]]:
    precision = request.param[:4]
    more = {}
    if "graphs" in request.param:
        more["cuda_graphs"] = "true"
    if "workers" in request.param:
        more["workers"] = "2"
    with ExitStack() as stack:
        service = stack.enter_context(
            served(ROOT / "models", device="cuda", precision=precision, default_model="mnist", **more)
        )
        yield service, precision


def asked(service: Served, path: str, **arguments: Any) -> Any:
    answer = service.client.post(path, **arguments)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_it_says_where_it_runs(on_cuda: tuple[Served, str]) -> None:
    """/readyz names CUDA and the precision for the model that has it."""
    models = {model["name"]: model for model in on_cuda[0].client.get("/readyz").json()["models"]}
    assert {model["device"] for model in models.values()} == {"cuda"}
    assert models["mnist"]["precision"] == on_cuda[1]


def test_predictions_are_the_cpus(on_cpu: Served, on_cuda: tuple[Served, str]) -> None:
    """Label, lengths and capsules of a digit; its reconstruction within two grey levels."""
    service, precision = on_cuda
    query = "/predict?capsules=true&reconstruction=true"
    found, expected = (
        asked(one, query, content=DIGIT, headers=IMAGE)["predictions"][0] for one in (service, on_cpu)
    )
    assert found["label"] == expected["label"] == "7"
    for name in ("capsules", "lengths"):
        np.testing.assert_allclose(found[name], expected[name], atol=TOLERANCES[precision])
    first, second = (decode_data_url(each["reconstruction"]).astype(int) for each in (found, expected))
    assert np.abs(first - second).max() <= 2


def test_tweaks_and_sweeps_are_the_cpus(on_cpu: Served, on_cuda: tuple[Served, str]) -> None:
    """A tweaked reconstruction and a sweep, as PNGs: no pixel further than two grey levels."""
    service, _ = on_cuda
    tweaked = {"image": ("seven.png", DIGIT, "image/png")}
    for path, form in (("/reconstruct", {"request": TWEAKS}), ("/reconstruct/sweep", {})):
        images = [
            one.client.post(path, files=tweaked, data=form, headers={"accept": "image/png"})
            for one in (service, on_cpu)
        ]
        assert [answer.status_code for answer in images] == [200, 200], images[0].text
        first, second = (decode(answer.content).astype(int) for answer in images)
        assert np.abs(first - second).max() <= 2


def test_many_at_once_get_their_own_answers(on_cuda: tuple[Served, str]) -> None:
    """Whatever batches 48 callers happen to make, each of them asks about another image."""
    service, precision = on_cuda
    seven = decode(DIGIT)
    images = [encode(np.roll(seven, (moved % 7 - 3, moved // 7 - 3), (0, 1))) for moved in range(48)]
    alone = [asked(service, "/predict", content=one, headers=IMAGE)["predictions"][0] for one in images]
    with ThreadPoolExecutor(48) as callers:
        together = list(
            callers.map(
                lambda one: asked(service, "/predict", content=one, headers=IMAGE)["predictions"][0],
                images * 4,
            )
        )
    for found, expected in zip(together, alone * 4, strict=True):
        np.testing.assert_allclose(found["lengths"], expected["lengths"], atol=TOLERANCES[precision])
