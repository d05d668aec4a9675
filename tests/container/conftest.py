import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.container import docker
from tests.container.docker import Container
from tests.support.encoded import encode
from tests.support.tiny_model import image_of, write_tiny_model

ROOT = Path(__file__).parents[2]
DIGIT = 3


@pytest.fixture(scope="session")
def engine() -> None:
    """Skips what needs a Docker engine where none answers."""
    if shutil.which("docker") is None:
        pytest.skip("needs a Docker engine, and there is no docker command")
    answer = docker.run("docker", "version", "--format", "{{.Server.Version}}")
    if answer.returncode != 0:
        pytest.skip(f"needs a Docker engine: {answer.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="session")
def image(engine: None) -> str:
    """The CPU image, built from the working tree."""
    docker.docker("build", "--tag", "capsnet:test", str(ROOT), timeout=900)
    return "capsnet:test"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that the container's user can read: pytest makes its folders for their owner alone."""
    folder = tmp_path_factory.mktemp("models")
    folder.chmod(0o755)
    write_tiny_model(folder)
    return folder


@pytest.fixture
def container(image: str, models: Path) -> Iterator[Container]:
    """A ready service, one for each test since some of them stop it."""
    started = docker.start(image, models)
    try:
        docker.wait_until_ready(started.url, log=("docker", "logs", started.name))
        yield started
    finally:
        docker.docker("rm", "--force", started.name)


@pytest.fixture(scope="session")
def png() -> bytes:
    """An image that the tiny model takes for DIGIT."""
    return encode(image_of(DIGIT))
