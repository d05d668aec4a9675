"""A few seconds of the soak that `make soak` runs for a quarter of an hour."""

import asyncio
from pathlib import Path

from tests.soak.run import SETTINGS, soak, verdict
from tests.support.process import served
from tests.support.tiny_model import write_tiny_model


def test_hostile_load_over_capacity_spoils_no_answer(tmp_path: Path) -> None:
    """Every answer is right or 503, hostile callers get what they deserve, and nothing of them is left."""
    folder = write_tiny_model(tmp_path)
    with served(tmp_path, **SETTINGS) as service:
        seen = asyncio.run(soak(service, folder, duration=5))
        assert verdict(seen, steady=False) == []
        assert service.process.poll() is None
        assert not any("Traceback" in line for line in service.log)
    assert seen.statuses["200"] > 0
