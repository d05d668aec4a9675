"""What every kind of test may use."""

import os
from pathlib import Path

import pytest

from tests.support.tiny_model import write_tiny_model

# Settings that whoever runs the tests has for the service, which reads them in any case, are not the tests'.
for name in list(os.environ):
    if name.upper().startswith("CAPSNET_") and name != "CAPSNET_DATA_DIR":
        del os.environ[name]


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
