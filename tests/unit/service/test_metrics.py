"""What a queue's metrics hold after one batch, and where processes may count together."""

import os
from pathlib import Path

import pytest
from prometheus_client import values

from service.context import Stage
from service.errors import StartError
from service.metrics import Metrics
from tests.support.figures import figures, value


@pytest.mark.parametrize("queue", ["encoder", "decoder"])
def test_a_batch_is_observed_as_it_was(queue: str) -> None:
    """Its rows and the seconds of each graph are those that it had; a graph that it has not is not told."""
    metrics = Metrics()
    batch = metrics.queue("tiny", "1", queue)
    batch.batch(3, [Stage("queue", 0, 9), Stage("encoder", 1, 1.25), Stage("decoder", 2, 2.5)])
    found = figures(metrics.exposition("")[0].decode())
    name = "capsnet_inference_duration_seconds_sum"
    graphs = {"encoder": {"encoder": 0.25, "decoder": 0.5}, "decoder": {"decoder": 0.5}}[queue]
    assert {
        dict(told)["graph"]: seconds for (sample, told), seconds in found.items() if sample == name
    } == graphs
    buckets = {"model": "tiny", "version": "1", "queue": queue}
    least = [value(found, "capsnet_batch_size_bucket", **buckets, le=f"{rows}.0") for rows in (1, 2, 4)]
    assert least == [0, 0, 1]


def test_a_folder_that_cannot_be_written_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes cannot count together in a folder that is there, but not theirs."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda _, mode: not mode & os.W_OK)  # root may write anywhere
    with pytest.raises(StartError, match="PROMETHEUS_MULTIPROC_DIR"):
        Metrics()


def test_a_retired_version_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where processes count together its figures cannot go, and a 0 says so."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    # As the library does when it is loaded.
    shared = values.MultiProcessValue()  # type: ignore[no-untyped-call] # theirs
    monkeypatch.setattr(values, "ValueClass", shared)
    metrics = Metrics()
    told = []
    for state in (metrics.model, metrics.forget):
        state("tiny", "1", "cpu", "fp32", 1)
        found = figures(metrics.exposition("")[0].decode())
        told += [number for (name, _), number in found.items() if name == "capsnet_model_info"]
    assert told == [1, 0]
