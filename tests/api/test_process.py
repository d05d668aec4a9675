"""The real process: start, serve, drain, exit."""

import contextlib
import gzip
import io
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import numpy as np
import pytest

from tests.support.encoded import npy, png_bomb
from tests.support.process import (
    HANGING,
    IMAGE,
    LIMIT,
    PNG,
    START_LIMIT,
    connected,
    environment,
    hang,
    served,
    until,
    until_closed,
)
from tests.support.tiny_model import write_tiny_model

HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n" % (
    len(PNG)
)


def test_a_request_in_flight_at_sigterm_is_answered_and_the_exit_code_is_0(tiny_models: Path) -> None:
    """After SIGTERM nothing new is accepted, a request half sent is answered, and the exit is clean."""
    with served(tiny_models) as service:
        assert service.predict() == "3"
        with socket.create_connection(("127.0.0.1", service.port), timeout=LIMIT) as connection:
            head = (
                f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(PNG)}"
            )
            connection.sendall(head.encode() + b"\r\nExpect: 100-continue\r\n\r\n")
            assert b"100 Continue" in connection.recv(1000)  # the request is in the application's hands
            connection.sendall(PNG[:20])
            stopping = time.monotonic()
            service.process.send_signal(signal.SIGTERM)
            service.refuses_connections()
            connection.sendall(PNG[20:])
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["predictions"][0]["label"] == "3"
        assert service.process.wait(LIMIT) == 0
        assert time.monotonic() - stopping < LIMIT


def test_a_process_without_file_descriptors_says_so_and_drains(tiny_models: Path) -> None:
    """Where connections have taken them all, the log says it, and the request in flight is still answered."""
    with served(tiny_models) as service, contextlib.ExitStack() as stack:
        assert service.predict() == "3"  # Pillow opens the files of its decoders when they are first used
        connection = stack.enter_context(connected(service))
        connection.sendall(HEAD + PNG[:20])
        resource.prlimit(service.process.pid, resource.RLIMIT_NOFILE, (60, 60))
        for _ in range(80):
            stack.enter_context(connected(service))
        until(lambda: any("Too many open files" in line for line in service.log))
        service.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)  # for the drain to begin
        connection.sendall(PNG[20:])
        assert until_closed(connection).startswith(b"HTTP/1.1 200 OK")
        assert service.process.wait(LIMIT) == 0
    assert not any("Traceback" in line for line in service.log)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_request_that_never_ends_does_not_hold_up_the_exit(tiny_models: Path, workers: str) -> None:
    """At the drain limit a half-sent request is told that the service stops, and the exit is clean."""
    settings = {"drain_timeout": "0.2", "log_format": "json", "access_log": "true", "workers": workers}
    with (
        served(tiny_models, **settings) as service,
        connected(service) as connection,
    ):
        connection.sendall(HEAD + PNG[:20])
        service.process.send_signal(signal.SIGTERM)
        answer = until_closed(connection)
        assert service.process.wait(LIMIT) == 0
    assert answer.startswith(b"HTTP/1.1 503")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["type"] == "urn:capsnet:problem:shutting-down"
    entries = [json.loads(line) for line in service.log]
    assert [entry["status"] for entry in entries if entry["logger"] == "service.access"] == [503]
    assert any(entry["message"].startswith("Shutting down: ") for entry in entries)
    assert not any("exception" in entry for entry in entries)


def test_a_second_interrupt_ends_a_request_that_never_ends(tiny_models: Path) -> None:
    """Whoever presses Ctrl-C twice waits neither for the drain nor for the rest of a body."""
    with (
        served(tiny_models, drain_timeout="30", body_timeout="30") as service,
        connected(service) as connection,
    ):
        connection.sendall(HEAD + PNG[:20])
        service.process.send_signal(signal.SIGINT)
        time.sleep(0.5)  # for the drain to begin
        service.process.send_signal(signal.SIGINT)
        answer = until_closed(connection)
        assert service.process.wait(LIMIT) == 0
    assert answer.startswith(b"HTTP/1.1 503")


def test_a_decode_that_never_ends_does_not_hold_up_the_exit(tiny_models: Path) -> None:
    """At the drain limit the request is refused and the process ends, whatever its threads still do."""
    with (
        served(tiny_models, program=("-c", HANGING), drain_timeout="0.2") as service,
        connected(service) as connection,
    ):
        hang(service, connection)
        service.process.send_signal(signal.SIGTERM)
        assert until_closed(connection).startswith(b"HTTP/1.1 503")
        assert service.process.wait(LIMIT) == 0
    assert service.log[-1].endswith(" stopped\n")


@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGTERM, "1"), (signal.SIGINT, "1"), (signal.SIGTERM, "2")]
)
def test_an_idle_process_stops_at_once(tiny_models: Path, number: signal.Signals, workers: str) -> None:
    """An open connection without a request does not hold up the exit, of which the log tells."""
    with served(tiny_models, workers=workers) as service:
        assert service.predict() == "3"  # leaves a keep-alive connection
        said = len(service.log)
        service.process.send_signal(number)
        assert service.process.wait(5) == 0
    first, last = service.log[said:]
    assert re.search(r" INFO service\.\w+: told to stop; .* within 8 s$", first)
    assert re.search(r" INFO service\.\w+: stopped$", last)


@pytest.mark.parametrize("extra", [-1, 1], ids=["never whole", "too large"])
def test_unended_bodies_take_bounded_memory_together(tiny_models: Path, extra: int) -> None:
    """However many connections send large bodies and never end them, what they hold has one limit."""
    with (
        served(tiny_models, max_body=str(2**23), max_bodies=str(2**24), body_timeout="5") as service,
        contextlib.ExitStack() as stack,
    ):
        assert service.predict() == "3"
        before = service.peak_memory()
        head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
        chunk = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % 2**24 + bytes(2**23 + extra)
        for _ in range(16):
            connection = stack.enter_context(
                socket.create_connection(("127.0.0.1", service.port), timeout=LIMIT)
            )
            connection.sendall(head + chunk)
        assert service.peak_memory() - before < 64 * 2**20
        time.sleep(5)
        assert service.predict() == "3"


def test_hostile_requests_take_bounded_memory(tiny_models: Path) -> None:
    """Bombs, large bodies and millions of values leave the process small and serving."""
    with served(tiny_models) as service:
        assert service.predict() == "3"
        before = service.peak_memory()
        values = b'{"images": [' + b"0," * 8_000_000 + b"0]}"
        attacks = [
            (png_bomb(20_000, 20_000), "image/png"),
            (bytes(17 * 2**20), "image/png"),
            (bytes(15 * 2**20), "image/png"),
            (values[: 16 * 2**20], "application/json"),
            (b'{"a":' * 3_000_000, "application/json"),
            (b"{" + b'"a":0,' * 2_000_000 + b'"b":0}', "application/json"),
            (b"--x\r\n" * 3_000_000, "multipart/form-data; boundary=x"),
            (npy(np.zeros(15 * 2**20, np.uint8)), "application/x-npy"),
            (b'{"images": [' + b"0," * 32_000 + b"0]}", "application/json"),
        ]
        for body, kind in attacks:
            answer = service.client.post("/predict", content=body, headers={"content-type": kind})
            assert 400 <= answer.status_code < 500
        wrong_tensors = gzip.compress(b'{"inputs": [' + b"{}," * 190_000 + b"{}]}")
        compressed = {"content-encoding": "gzip"}
        answer = service.client.post(
            "/v2/models/tiny-encoder/infer", content=wrong_tensors, headers=compressed
        )
        assert answer.status_code == 400
        assert service.predict() == "3"
        assert service.peak_memory() - before < 128 * 2**20


def start(models: Path, *options: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 # our own interpreter and module
        [sys.executable, "-m", "service.main", *options],
        env=environment(models, **settings),
        capture_output=True,
        text=True,
        timeout=START_LIMIT,
        check=False,
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"port": "99999"}, "CAPSNET_PORT: Input should be less than or equal to 65535 (received '99999')"),
        ({"device": "tpu"}, "CAPSNET_DEVICE: Input should be 'auto', 'cpu' or 'cuda' (received 'tpu')"),
        ({"max_batch": "512"}, "queue_length must be at least max_batch"),
        ({"workers": "2", "grpc_port": "0"}, "grpc_port needs workers to be 1"),
        ({"workers": "2", "repository": "true"}, "repository needs workers to be 1"),
    ],
)
def test_a_bad_setting_stops_the_start_with_one_line(
    tiny_models: Path, settings: dict[str, str], says: str
) -> None:
    """The line names the setting, what was received and what is expected."""
    ended = start(tiny_models, **settings)
    assert ended.returncode == 2
    assert says in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_a_start_that_nobody_can_be_told_of_fails_as_ever(tiny_models: Path) -> None:
    """Where the line cannot be written, the exit code is the same."""
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "service.main"],
            env=environment(tiny_models, port="99999"),
            stderr=full,
            timeout=START_LIMIT,
            check=False,
        )
    assert ended.returncode == 2


def test_a_misspelt_setting_is_named_once(tiny_models: Path) -> None:
    """The log says that it has no effect, and how it is spelt, however many processes serve."""
    with served(tiny_models, workers="2", drain_timout="5") as service:
        (told,) = (line for line in service.log if "CAPSNET_DRAIN_TIMOUT" in line)
    assert told.endswith("has no effect; CAPSNET_DRAIN_TIMEOUT is\n")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_broken_model_stops_the_start_with_its_file_and_reason(tmp_path: Path, workers: str) -> None:
    """An altered graph is named once, on the last line, without a stack."""
    folder = write_tiny_model(tmp_path)
    with (folder / "decoder.onnx").open("ab") as file:
        file.write(b"x")
    ended = start(tmp_path, workers=workers)
    assert ended.returncode == 1
    assert ended.stderr.count("capsnet-serve: ") == 1
    assert re.search(r"capsnet-serve: .*tiny/1/decoder\.onnx: sha256 is .*, expected .*\n$", ended.stderr)
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_wrong_folder_to_count_in_stops_the_start_with_one_line(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    """Where figures of several processes cannot be kept, the operator is told which variable is wrong."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "nowhere"))
    ended = start(tiny_models, workers=workers)
    assert ended.returncode == 1
    assert ended.stderr.count("capsnet-serve: PROMETHEUS_MULTIPROC_DIR: ") == 1
    assert ended.stderr.endswith("nowhere' is no folder that can be written to\n")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("settings", [{}, {"grpc_port": "0"}, {"workers": "2"}], ids=str)
def test_a_taken_port_stops_the_start(tiny_models: Path, settings: dict[str, str]) -> None:
    """Before anything else happens one line says that the address is in use."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = start(tiny_models, "--port", str(port), **settings)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"capsnet-serve: CAPSNET_PORT: 127.0.0.1:{port} cannot be taken: ")
    assert ended.stderr.endswith("address already in use\n")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("in_namespace", [False, True], ids=["child", "process 1"])
def test_sigterm_ends_a_start_at_once(tmp_path: Path, workers: str, in_namespace: bool) -> None:
    """While models are loaded the process still stops when told to, with exit code 0, also as process 1."""
    namespace = ["unshare", "-pf", "--kill-child"] if in_namespace else []
    if subprocess.run([*namespace, "true"], check=False, capture_output=True).returncode:  # noqa: S603 # ours
        pytest.skip("needs unshare, and leave to make a PID namespace")
    manifest = tmp_path / "tiny" / "1" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    os.mkfifo(manifest)  # holds up whoever reads it
    command = [sys.executable, "-m", "service.main", "--port", "0", "--workers", workers]
    process = subprocess.Popen(  # noqa: S603 # our own interpreter and module
        [*namespace, *command], env=environment(tmp_path)
    )
    try:
        with manifest.open("wb"):  # returns when the service has come to its models
            service = process.pid
            if in_namespace:
                service = int(Path(f"/proc/{service}/task/{service}/children").read_text())
            os.kill(service, signal.SIGTERM)
            assert process.wait(LIMIT) == 0
    finally:
        process.kill()
        process.wait()


# Of its workers, one gets ready and says so, and every other takes its time.
ONE_READY = """
import os, sys, time
from service import engine, server
from service.main import main

load = engine.load_graphs

def load_if_first(*arguments):
    try:
        os.mkdir({place!r})
    except FileExistsError:
        time.sleep(600)
    return load(*arguments)

class Inbox(server.Inbox):
    def tell(self, notice):
        super().tell(notice)
        print("told", notice.name, file=sys.stderr, flush=True)

engine.load_graphs = load_if_first
server.Inbox = Inbox
sys.exit(main())
"""


def test_sigterm_ends_a_start_in_which_one_worker_is_ready(tmp_path: Path) -> None:
    """A worker that is ready already, but was never offered anything, waits for nothing when told to stop."""
    write_tiny_model(tmp_path)
    program = ONE_READY.format(place=str(tmp_path / "first"))
    process = subprocess.Popen(  # noqa: S603 # our own interpreter and program
        [sys.executable, "-c", program, "--port", "0"],
        env=environment(tmp_path, workers="2", drain_timeout="60"),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        assert any(line == "told READY\n" for line in process.stderr)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 0
    finally:
        process.kill()
        process.communicate()


# Of its workers, the first cannot start, and every other takes its time.
ONE_FAILS = """
import os, sys, time
from service import engine
from service.errors import StartError
from service.main import main

def fail_if_first(*_):
    try:
        os.mkdir({place!r})
    except FileExistsError:
        time.sleep(600)
    raise StartError("there is no such device")

engine.load_graphs = fail_if_first
sys.exit(main())
"""


def test_a_worker_that_cannot_start_ends_the_others_start(tmp_path: Path) -> None:
    """Its reason is told at once, however long the others take, and none of them is left."""
    write_tiny_model(tmp_path)
    ended = subprocess.run(  # noqa: S603 # our own interpreter and program
        [sys.executable, "-c", ONE_FAILS.format(place=str(tmp_path / "first")), "--port", "0"],
        env=environment(tmp_path, workers="2"),
        capture_output=True,  # to the end of all who could write: none may be left
        text=True,
        timeout=START_LIMIT,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr.endswith("capsnet-serve: there is no such device\n")


def test_a_full_disk_under_the_log_changes_no_answer(tiny_models: Path) -> None:
    """Lines that cannot be written are lost, and nothing else: answers, drain and exit code are as ever."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    full = os.open("/dev/full", os.O_WRONLY)
    variables = environment(tiny_models, access_log="true")
    variables.pop("PYTHONUNBUFFERED", None)  # what was not written is then tried again at the end
    process = subprocess.Popen(  # noqa: S603 # our own interpreter and module
        [sys.executable, "-m", "service.main", "--port", str(port)],
        env=variables,
        stdout=full,
        stderr=full,
    )
    os.close(full)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=LIMIT) as client:
            deadline = time.monotonic() + START_LIMIT
            while True:
                try:
                    client.get("/readyz")
                    break
                except httpx2.ConnectError:
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
            for _ in range(100):
                answer = client.post("/predict", content=PNG, headers=IMAGE)
                assert answer.json()["predictions"][0]["label"] == "3"
            assert client.post("/predict", content=b"x", headers=IMAGE).status_code == 422
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 0
    finally:
        process.kill()
        process.wait()


def test_threads_are_those_that_were_asked_for(tiny_models: Path) -> None:
    """A session has as many threads as it is set to, and no library brings one for each processor."""
    sessions = 2 * 3  # two graphs of three models
    for threads in (1, 3):
        with served(tiny_models, threads=str(threads)) as service:
            tasks = len(list(Path(f"/proc/{service.process.pid}/task").iterdir()))
        # The event loop, libuv's four for looking up names, one that runs each session, its others.
        assert tasks == 1 + 4 + sessions + sessions * (threads - 1)


def imported_by(module: str) -> set[str]:
    """Top-level names of everything that importing a module brings in."""
    ended = subprocess.run(  # noqa: S603 # our own interpreter
        [sys.executable, "-c", f"import {module}, sys; print(*sys.modules, sep='\\n')"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.partition(".")[0] for name in io.StringIO(ended.stdout).read().split()}


def test_serving_never_imports_torch_or_training() -> None:
    """Importing the service brings in neither, whatever is installed."""
    assert imported_by("service.server").isdisjoint({"torch", "training", "onnx", "matplotlib"})


def test_the_engine_is_plain_python() -> None:
    """From the engine down nothing knows of HTTP."""
    assert imported_by("service.engine").isdisjoint({"fastapi", "starlette", "uvicorn"})
    assert imported_by("service.decoding").isdisjoint({"fastapi", "starlette", "uvicorn"})


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_failed_start_is_json_where_the_log_is(tmp_path: Path, workers: str) -> None:
    """What stops a start is an object with the same words as on a line for people."""
    ended = start(tmp_path, log_format="json", workers=workers)
    assert ended.returncode == 1
    entry = json.loads(ended.stderr.splitlines()[-1])
    assert (entry["level"], entry["logger"]) == ("error", "service.main")
    assert entry["message"].startswith(f"{tmp_path}: holds no model; expected ")


def test_every_line_of_a_json_log_is_json(tiny_models: Path) -> None:
    """From start to stop each line is an object, and a refused request has none beside its access line."""
    with served(tiny_models, log_format="json", access_log="true") as service:
        service.predict()
        identity = service.client.post("/predict", content=b"x", headers=IMAGE).headers["x-request-id"]
        form = {"content-type": "multipart/form-data; boundary=x"}
        assert service.client.post("/predict", content=b"no form", headers=form).status_code == 400
        with socket.create_connection(("127.0.0.1", service.port), timeout=LIMIT) as connection:
            connection.sendall(b"this is not HTTP\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 400")
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(LIMIT) == 0
    entries = [json.loads(line) for line in service.log]
    access = [entry for entry in entries if entry["logger"] == "service.access"]
    assert [(entry["route"], entry["status"]) for entry in access] == [
        ("/predict", 200),
        ("/predict", 422),
        ("/predict", 400),
    ]
    assert access[1]["request_id"] == identity
    assert [entry for entry in entries if entry.get("request_id")] == access
    assert "service.refusals" in {entry["logger"] for entry in entries}
