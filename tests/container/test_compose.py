"""The Compose files: what they pass on, and that they run."""

import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from service.settings import Settings
from tests.container.conftest import DIGIT, ROOT
from tests.container.docker import run, wait_until_ready

FILES = ("--file", str(ROOT / "docker-compose.yml"))
GPU_FILES = (*FILES, "--file", str(ROOT / "docker-compose.gpu.yml"))
# These have another meaning inside the container, where the image sets them.
SET_INSIDE = {"CAPSNET_HOST", "CAPSNET_PORT", "CAPSNET_MODELS"}
# Compose makes the image without the extra `grpc`, and a port that may not be there cannot be published.
NOT_IN_THE_IMAGE = {"CAPSNET_GRPC_PORT"}
UVICORNS = {"FORWARDED_ALLOW_IPS"}


def test_every_setting_is_passed_on() -> None:
    """A variable that works with `make serve` works with `docker compose up`."""
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    settings = {f"CAPSNET_{name.upper()}" for name in Settings.model_fields}

    assert (
        set(re.findall(r"^ +- ([A-Z]+_\w+)$", text, re.MULTILINE))
        == (settings - SET_INSIDE - NOT_IN_THE_IMAGE) | UVICORNS
    )


@pytest.fixture(scope="module")
def compose() -> tuple[str, ...]:
    """The newer command where there is one, otherwise the older one; both must do."""
    if shutil.which("docker") and run("docker", "compose", "version").returncode == 0:
        return ("docker", "compose")
    if shutil.which("docker-compose"):
        return ("docker-compose",)
    pytest.skip("needs `docker compose` or `docker-compose`")


@pytest.mark.container
@pytest.mark.parametrize("files", [FILES, GPU_FILES], ids=["cpu", "gpu"])
def test_files_are_valid(compose: tuple[str, ...], files: tuple[str, ...]) -> None:
    """Compose accepts each file and says nothing against it."""
    done = run(*compose, *files, "config", "--quiet")

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.container
def test_gpu_file_asks_for_a_gpu_and_no_fallback(compose: tuple[str, ...]) -> None:
    """The one switch changes the image, reserves a device and forbids the CPU."""
    config = run(*compose, *GPU_FILES, "config").stdout

    assert "image: capsnet:gpu" in config
    assert "driver: nvidia" in config
    assert "CAPSNET_DEVICE: cuda" in config


@pytest.fixture
def up(
    compose: tuple[str, ...], image: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The URL of what `up` has brought up, with the image under test and the tiny model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("CAPSNET_PORT", str(port))
    over = tmp_path / "override.yml"
    over.write_text(
        f'services:\n  capsnet:\n    image: {image}\n    volumes:\n      - "{models}:/models:ro"\n',
        encoding="utf-8",
    )
    project = (*compose, *FILES, "--file", str(over), "--project-name", "capsnet-test")
    try:
        done = run(*project, "up", "--detach", "--no-build")
        assert done.returncode == 0, done.stderr
        yield f"http://127.0.0.1:{port}"
    finally:
        run(*project, "down", "--timeout", "5")


@pytest.mark.container
def test_up_serves(up: str, png: bytes) -> None:
    """`up` answers where CAPSNET_PORT says, under the restrictions that the file sets."""
    wait_until_ready(up, log=("docker", "ps", "--all"))

    answer = httpx2.post(f"{up}/predict", content=png, headers={"Content-Type": "image/png"})

    assert answer.json()["predictions"][0]["label"] == str(DIGIT)
