"""What every kind of test may use."""

import os
from pathlib import Path

import pytest

from tests.support.tiny_model import write_tiny_model

# Settings that whoever runs the tests has for the service, which reads them in any case, are not the tests'.
for name in list(os.environ):
    if name.upper().startswith("CAPSNET_") and name != "CAPSNET_DATA_DIR":
        del os.environ[name]

# Where several processes share the tests, each has one core for PyTorch, which reads this when it is loaded.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Processes share the tests file by file, as the dearest fixtures are; containers have one engine."""
    for item in items:
        group = "container" if item.get_closest_marker("container") else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))


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
