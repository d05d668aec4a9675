"""The service in this process, over the tiny models."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.settings import Settings

Serve = Callable[..., TestClient]


@pytest.fixture
def serve(tiny_models: Path) -> Iterator[Serve]:
    """Start a service with settings of the test's own."""
    with ExitStack() as stack:

        def start(**changes: Any) -> TestClient:
            values = {"models": tiny_models, "device": "cpu", "default_model": "tiny", **changes}
            app = create_app(Settings.model_validate(values))
            return stack.enter_context(TestClient(app, raise_server_exceptions=False))

        yield start


@pytest.fixture(scope="session")
def client(tiny_models: Path) -> Iterator[TestClient]:
    """A service with its default limits, shared by all tests: each finds it as the one before left it."""
    settings = Settings(models=tiny_models, device="cpu", default_model="tiny")
    with TestClient(create_app(settings), raise_server_exceptions=False) as started:
        yield started


def problem(answer: httpx2.Response, status: int) -> dict[str, Any]:
    """The problem document of an answer, which must be complete and say nothing of our insides."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = answer.json()
    assert document["status"] == status
    assert document["type"].startswith("urn:capsnet:problem:")
    assert document["title"]
    assert document["detail"]
    assert "Traceback" not in answer.text
    assert "site-packages" not in answer.text
    assert "/service/" not in answer.text
    if status < 500:
        assert document["received"]
        assert document["expected"]
    return document
