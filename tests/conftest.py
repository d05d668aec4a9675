"""What every kind of test may use."""

from pathlib import Path

import pytest

from tests.support.tiny_model import write_tiny_model


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio, as the service does."""
    return "asyncio"


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder: `tiny` in versions 1 and 2, and `colour`, which is not the default.

    The dimensions of `tiny/2`, the newest, have names.
    """
    models = tmp_path_factory.mktemp("models")
    write_tiny_model(models, "tiny", "1")
    write_tiny_model(models, "tiny", "2", named=True)
    write_tiny_model(models, "colour", "1", channels=3)
    return models
