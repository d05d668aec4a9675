"""The image, run as strictly as people may run it."""

import http.client
import json
import os
import re
import threading
import time
from pathlib import Path

import grpc
import httpx2
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from tests.container.conftest import DIGIT, ROOT
from tests.container.docker import Container, docker, run, start, wait_until_ready

pytestmark = pytest.mark.container

SIZE_LIMIT = 450_000_000  # bytes, as `docker images` counts them
STOP_LIMIT = 10.0  # seconds, after which `docker stop` kills


def python(image: str, program: str, *options: str) -> str:
    """What `program` prints when the image's own Python runs it, as the image's own user."""
    return docker("run", "--rm", *options, "--entrypoint", "python", image, "-c", program)


def test_predicts_with_a_read_only_root_and_no_capabilities(container: Container, png: bytes) -> None:
    """Nothing that serving needs is lost to the strictest flags."""
    answer = httpx2.post(f"{container.url}/predict", content=png, headers={"Content-Type": "image/png"})

    assert answer.status_code == 200, answer.text
    assert answer.json()["predictions"][0]["label"] == str(DIGIT)


def test_reconstructs_with_a_read_only_root_and_no_capabilities(container: Container, png: bytes) -> None:
    """A multipart body, which may be spooled to disk, works as well."""
    request = json.dumps({"tweaks": [{"dimension": 0, "delta": 0.1}]})

    answer = httpx2.post(
        f"{container.url}/reconstruct",
        files={"image": ("digit.png", png, "image/png"), "request": (None, request, "application/json")},
        headers={"Accept": "image/png"},
    )

    assert answer.status_code == 200, answer.text
    assert answer.content.startswith(b"\x89PNG")


def test_becomes_healthy(container: Container) -> None:
    """The image's own health check finds the service."""
    _wait_until_healthy(container)


def test_becomes_healthy_where_health_needs_a_key(image: str, models: Path) -> None:
    """The health check finds the port and a key where the service finds them."""
    settings = {
        "CAPSNET_PORT": "9000",
        "CAPSNET_API_KEYS": " ,the first key of all, another-key-to-have",
        "CAPSNET_HEALTH_NEEDS_KEY": "true",
    }
    options = [part for name, value in settings.items() for part in ("--env", f"{name}={value}")]
    started = start(image, models, *options, port=9000)
    try:
        _wait_until_healthy(started)
        assert httpx2.get(f"{started.url}/readyz").status_code == 401
    finally:
        docker("rm", "--force", started.name)


def _wait_until_healthy(container: Container) -> None:
    deadline = time.monotonic() + 30
    while (health := container.inspect("{{.State.Health.Status}}")) == "starting":
        assert time.monotonic() < deadline, container.inspect("{{json .State.Health}}")
        time.sleep(0.5)

    assert health == "healthy", container.inspect("{{json .State.Health}}")


def test_logs_only_its_own_lines(container: Container) -> None:
    """No library complains of the read-only root, and ONNX Runtime does not report to anyone."""
    assert all(
        " INFO service." in line or " INFO __main__" in line for line in container.logs().splitlines()
    ), container.logs()


def test_stop_answers_what_is_in_flight(container: Container, png: bytes) -> None:
    """A request that had begun before `docker stop` is answered, and the exit is clean and in time."""
    connections = [http.client.HTTPConnection("127.0.0.1", container.port, timeout=20) for _ in range(8)]
    for connection in connections:
        connection.putrequest("POST", "/predict")
        connection.putheader("Content-Type", "image/png")
        connection.putheader("Content-Length", str(len(png)))
        connection.endheaders(png[:20])
    time.sleep(0.5)  # until the service has read these halves

    began = time.monotonic()
    stop = threading.Thread(target=docker, args=("stop", container.name))
    stop.start()
    while _is_ready(container):
        assert time.monotonic() < began + STOP_LIMIT, "SIGTERM did not reach the service"
        time.sleep(0.05)
    labels = []
    for connection in connections:
        connection.send(png[20:])
    for connection in connections:
        answer = connection.getresponse()
        labels.append(json.load(answer)["predictions"][0]["label"])
    stop.join()

    assert labels == [str(DIGIT)] * len(connections)
    assert time.monotonic() - began < STOP_LIMIT
    assert container.inspect("{{.State.ExitCode}}") == "0", container.logs()


def _is_ready(container: Container) -> bool:
    try:
        return httpx2.get(f"{container.url}/readyz").is_success
    except httpx2.TransportError:
        return False


def test_idle_stop_takes_no_time(container: Container) -> None:
    """SIGTERM reaches the server itself: no shell swallows it, nothing waits for nobody."""
    began = time.monotonic()

    docker("stop", container.name)

    assert time.monotonic() - began < STOP_LIMIT / 2
    assert container.inspect("{{.State.ExitCode}}") == "0", container.logs()


@pytest.mark.parametrize(("cpus", "threads"), [("0.5", 1), ("1", 1), ("1.5", 2)])
def test_threads_follow_the_containers_cpu_limit(image: str, models: Path, cpus: str, threads: int) -> None:
    """Each session gets as many threads as the limit has processors, however many the machine has."""
    if (os.cpu_count() or 1) < threads:
        pytest.skip(f"needs {threads} processors")
    started = start(image, models, "--cpus", cpus)
    try:
        wait_until_ready(started.url, log=("docker", "logs", started.name))
        served = httpx2.get(f"{started.url}/models").json()["models"]
        metrics = httpx2.get(f"{started.url}/metrics").text
        log = started.logs()
    finally:
        docker("rm", "--force", started.name)

    assert {model["threads"] for model in served} == {threads}
    assert re.findall(r'capsnet_model_info{.*threads="(\d+)"', metrics) == [str(threads)]
    assert f"{threads} CPU threads" in log


def test_says_what_is_wrong_with_the_models(image: str, tmp_path: Path) -> None:
    """A container that cannot serve ends at once and names the folder, instead of idling unready."""
    tmp_path.chmod(0o755)

    done = run("docker", "run", "--rm", "--volume", f"{tmp_path}:/models:ro", image)

    assert done.returncode not in (0, 125, 126, 127), done.stderr  # 125 to 127 are Docker's own
    assert "/models" in done.stderr
    assert "Traceback" not in done.stderr


def test_options_reach_the_service(image: str) -> None:
    """What follows the image's name are the service's options."""
    done = run("docker", "run", "--rm", image, "--port", "99999")

    assert done.returncode not in (0, 125, 126, 127), done.stderr
    assert "99999" in done.stderr


def test_user_is_a_number_other_than_root(image: str) -> None:
    """Kubernetes' runAsNonRoot accepts the image as it is."""
    user = docker("image", "inspect", "--format", "{{.Config.User}}", image)

    assert user.partition(":")[0].isdecimal()
    assert int(user.partition(":")[0]) > 0


def test_user_can_write_nowhere_that_code_or_models_come_from(image: str) -> None:
    """Even with a writable root, the service could not change what it runs."""
    program = (
        "import os, sys\n"
        "for root in (*filter(None, sys.path), '/app', '/models'):\n"
        "    for folder, _, files in os.walk(root):\n"
        "        for path in (folder, *(os.path.join(folder, file) for file in files)):\n"
        "            if not os.path.islink(path) and os.access(path, os.W_OK): print(path)\n"
    )

    assert python(image, program) == ""


def test_holds_only_what_serving_imports(image: str) -> None:
    """No torch, none of the training code, no test tools, and no pip to install them with."""
    program = (
        "import importlib.util as u\n"
        "print(*[n for n in ('torch', 'training', 'onnx', 'pytest', 'mypy', 'pip') if u.find_spec(n)])\n"
    )

    assert python(image, program) == ""


def test_code_is_compiled(image: str) -> None:
    """No module of ours or of the packages is compiled again at every start."""
    program = (
        "import importlib.util, pathlib\n"
        "for module in pathlib.Path('/app').rglob('*.py'):\n"
        "    if not pathlib.Path(importlib.util.cache_from_source(module)).exists(): print(module)\n"
        "import fastapi, onnxruntime\n"
        "for module in (fastapi, onnxruntime):\n"
        "    if not pathlib.Path(module.__cached__).exists(): print(module)\n"
    )

    assert python(image, program) == ""


def test_is_small(image: str) -> None:
    """Models included, the image stays under the limit."""
    size = int(docker("image", "inspect", "--format", "{{.Size}}", image))

    assert size < SIZE_LIMIT, f"{size / 1e6:.0f} MB"


def test_extras_are_built_in_where_asked_for(image: str, models: Path) -> None:
    """With EXTRAS=grpc the container answers over gRPC too; the image as it is made otherwise has none."""
    assert python(image, "import importlib.util as u; print(u.find_spec('grpc'))") == "None"
    docker("build", "--tag", "capsnet:test-grpc", "--build-arg", "EXTRAS=grpc", str(ROOT), timeout=900)
    started = start(
        "capsnet:test-grpc", models, "--env", "CAPSNET_GRPC_PORT=8001", "--publish", "127.0.0.1::8001"
    )
    try:
        wait_until_ready(started.url, log=("docker", "logs", started.name))
        address = docker("port", started.name, "8001/tcp").splitlines()[0]
        with grpc.insecure_channel(address) as channel:
            answer = HealthStub(channel).Check(
                HealthCheckRequest(service="inference.GRPCInferenceService"), timeout=STOP_LIMIT
            )
        assert answer.status == HealthCheckResponse.SERVING
    finally:
        docker("rm", "--force", started.name)


def test_misspelt_runtime_is_refused(image: str) -> None:
    """The build says which values it takes, rather than making an image without ONNX Runtime."""
    done = run("docker", "build", "--force-rm", "--build-arg", "RUNTIME=cuda", str(ROOT), timeout=300)

    assert done.returncode != 0
    assert "RUNTIME is 'cuda', expected cpu or gpu" in done.stdout + done.stderr
