"""The Docker command line, as far as these tests use it."""

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

# How docs and compose file run it. Whatever the service needs beyond this is a fault of the image.
HARDENED = (
    *("--read-only", "--tmpfs", "/tmp:size=64m"),  # noqa: S108, the container's own
    *("--cap-drop", "ALL", "--security-opt", "no-new-privileges:true"),
)
START_TIMEOUT = 30.0  # seconds; about one is usual


def run(*command: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def docker(*arguments: str, timeout: float = 60) -> str:
    """What `docker …` prints; what it complains of fails the test."""
    done = run("docker", *arguments, timeout=timeout)
    if done.returncode != 0:
        pytest.fail(f"docker {' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout.strip()


def wait_until_ready(url: str, *, log: tuple[str, ...]) -> None:
    """Return once /readyz says so; `log` is the command that tells why it does not."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        try:
            if httpx2.get(f"{url}/readyz").is_success:
                return
        except httpx2.TransportError:
            pass  # the engine accepts connections before the service does, and resets them
        time.sleep(0.05)
    done = run(*log)
    pytest.fail(f"{url} was not ready after {START_TIMEOUT:.0f} s: {done.stdout}{done.stderr}")


@dataclass(frozen=True)
class Container:
    name: str
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def inspect(self, template: str) -> str:
        return docker("inspect", "--format", template, self.name)

    def logs(self) -> str:
        done = run("docker", "logs", self.name)
        return done.stdout + done.stderr


def start(image: str, models: Path, *options: str, port: int = 8000) -> Container:
    """Run `image` in the background, hardened, with `models` in place of its own; it listens on `port`."""
    name = docker(
        *("run", "--detach", "--publish", f"127.0.0.1::{port}", "--volume", f"{models}:/models:ro"),
        *(*HARDENED, *options, image),
    )
    published = docker("port", name, f"{port}/tcp").splitlines()[0].rpartition(":")[2]
    return Container(name, int(published))
