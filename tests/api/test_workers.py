"""Several processes that serve together, and the one that keeps them."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx2

from tests.support.figures import figures
from tests.support.process import (
    HANGING,
    IMAGE,
    LIMIT,
    PNG,
    START_LIMIT,
    Served,
    connected,
    environment,
    hang,
    served,
    until,
    until_closed,
)
from tests.support.tiny_model import write_tiny_model

HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n" % len(PNG)
ALONE = HEAD + b"Connection: close\r\n\r\n" + PNG


def workers_of(service: Served) -> list[int]:
    pid = service.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def sockets_of(pid: int) -> int:
    count = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed in between
            count += str(entry.readlink()).startswith("socket:")
    return count


def is_running(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def ask_on(kept: http.client.HTTPConnection) -> int | None:
    """The status of an answer on a connection that stays open; None if it was closed instead."""
    try:
        kept.request("POST", "/predict", PNG, {"Content-Type": "image/png"})
        answer = kept.getresponse()
        answer.read()
    except ConnectionError:
        return None
    return answer.status


def kept_connection(service: Served, stack: contextlib.ExitStack) -> http.client.HTTPConnection:
    connection = stack.enter_context(
        contextlib.closing(http.client.HTTPConnection("127.0.0.1", service.port, timeout=LIMIT))
    )
    connection.connect()
    return connection


def version_asked(service: Served) -> str:
    """The version that answers on a new connection."""
    answer = httpx2.post(
        f"http://127.0.0.1:{service.port}/predict", content=PNG, headers=IMAGE, timeout=LIMIT
    )
    return str(answer.json()["model"]["version"])


def figure(service: Served, name: str, **labels: str) -> list[float]:
    """A metric's values, asked for on a new connection."""
    text = httpx2.get(f"http://127.0.0.1:{service.port}/metrics", timeout=LIMIT).text
    return [
        value for (sample, told), value in figures(text).items() if sample == name and labels.items() <= told
    ]


def metrics_folder_of(pid: int) -> Path:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return Path(
        next(v for v in variables if v.startswith(b"PROMETHEUS_MULTIPROC_DIR=")).decode().partition("=")[2]
    )


def test_workers_share_connections_and_survive_one_another(tiny_models: Path) -> None:
    """Kept connections are spread evenly, each worker tells all figures, a death harms only its callers."""
    with served(tiny_models, workers="2", head_timeout="60") as service, contextlib.ExitStack() as stack:
        first, second = workers_of(service)
        folder = metrics_folder_of(first)
        before = {pid: sockets_of(pid) for pid in (first, second)}
        kept = [kept_connection(service, stack) for _ in range(32)]
        until(lambda: sockets_of(first) + sockets_of(second) == sum(before.values()) + len(kept))
        assert sockets_of(first) - before[first] == sockets_of(second) - before[second] == 16

        # They came to the two in turn: where half of them are gone, all new ones belong, but for one or two.
        for connection in kept[::2]:
            connection.close()
        until(lambda: sockets_of(first) + sockets_of(second) == sum(before.values()) + 16)
        figure(service, "capsnet_requests_total")  # so that whoever shares out knows of the closed ones
        kept[::2] = [kept_connection(service, stack) for _ in range(16)]
        until(lambda: sockets_of(first) + sockets_of(second) == sum(before.values()) + len(kept))
        assert min(sockets_of(pid) - before[pid] for pid in (first, second)) > 12

        assert [ask_on(connection) for connection in kept] == [200] * 32
        for _ in range(2):  # each worker is asked once
            assert figure(service, "capsnet_requests_total", route="/predict", status="200") == [32]
        assert len(figure(service, "process_resident_memory_bytes")) == 2

        os.kill(first, signal.SIGKILL)
        until(lambda: not is_running(first))
        # New connections and those of the other worker are served; those that the dead one had are closed.
        assert ask_on(kept_connection(service, stack)) == 200
        statuses = Counter(ask_on(connection) for connection in kept)
        assert statuses == {200: 16, None: 16}
        until(lambda: len(figure(service, "process_resident_memory_bytes")) == 2, START_LIMIT)
        assert first not in workers_of(service)
        assert figure(service, "capsnet_requests_total", route="/predict", status="200") == [32 + 1 + 16]
        # Who replaces a worker counts on in its files: they must not become more, nor a figure less.
        until(lambda: sum("tiny/2 is ready" in line for line in service.log) == 3, START_LIMIT)
        assert [ask_on(kept_connection(service, stack)) for _ in range(2)] == [200, 200]
        until(lambda: figure(service, "capsnet_requests_total", route="/predict", status="200") == [51])
        assert figure(service, "capsnet_batch_size_count", queue="encoder", version="2") == [51]
        files = Counter(file.name.partition("_")[0] for file in folder.iterdir())
        assert files == {"counter": 2, "histogram": 2, "gauge": 4}

        ended = workers_of(service)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(LIMIT) == 0
        assert not any(map(is_running, ended))
        assert not folder.exists()
    assert any(f"worker {first} ended with exit code -9" in line for line in service.log)


def test_what_a_dead_worker_had_not_taken_is_answered_by_another(tiny_models: Path) -> None:
    """Of the connections that were on their way to a worker when it was killed, none is lost."""
    with served(tiny_models, workers="2") as service, contextlib.ExitStack() as stack:
        stuck, _ = workers_of(service)
        os.kill(stuck, signal.SIGSTOP)
        waiting = [stack.enter_context(connected(service)) for _ in range(20)]
        for connection in waiting:
            connection.sendall(ALONE)
        answered = [until_closed(connection) for connection in waiting[1::2]]  # every second one
        os.kill(stuck, signal.SIGKILL)
        answered += [until_closed(connection) for connection in waiting[::2]]
        assert all(answer.startswith(b"HTTP/1.1 200 OK") for answer in answered)


def test_a_stop_waits_until_workers_have_room_for_all(tiny_models: Path) -> None:
    """More connections than they may be offered are all accepted before the listening socket is closed."""
    with served(tiny_models, workers="2", drain_timeout="60") as service, contextlib.ExitStack() as stack:
        stuck = workers_of(service)
        # A terminal's Ctrl-C must reach them through the process that keeps them alone.
        assert len({os.getpgid(pid) for pid in (service.process.pid, *stuck)}) == 3
        for worker in stuck:
            os.kill(worker, signal.SIGSTOP)
        waiting = [stack.enter_context(connected(service)) for _ in range(160)]
        for connection in waiting:
            connection.sendall(ALONE)
        service.process.send_signal(signal.SIGTERM)
        time.sleep(1)  # for a stop that does not wait
        for worker in stuck:
            os.kill(worker, signal.SIGCONT)
        assert all(until_closed(connection).startswith(b"HTTP/1.1 200 OK") for connection in waiting)
        assert service.process.wait(LIMIT) == 0


# A service that waits less for its workers than people would.
IMPATIENT = """
import sys
from service import workers
from service.main import main

workers._ENDING = 0.1
sys.exit(main())
"""


def test_workers_that_hang_do_not_hold_up_a_stop(tiny_models: Path) -> None:
    """Those that neither take connections nor end are killed some time after the drain limit."""
    program = "-c", IMPATIENT
    with (
        served(tiny_models, program=program, workers="2", drain_timeout="0.2") as service,
        contextlib.ExitStack() as stack,
    ):
        stuck = workers_of(service)
        for worker in stuck:
            os.kill(worker, signal.SIGSTOP)
        for _ in range(160):  # more than they may be offered
            stack.enter_context(connected(service))
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(LIMIT) == 0
        assert not any(map(is_running, stuck))


def test_a_worker_that_is_told_to_stop_loses_nothing(tiny_models: Path) -> None:
    """SIGTERM to one worker under load: it finishes what it has, another follows, nobody is refused."""
    outcomes: Counter[str] = Counter()
    done = threading.Event()

    def call(port: int) -> None:
        while not done.is_set():
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=LIMIT) as connection:
                    connection.sendall(ALONE)
                    outcomes[until_closed(connection)[:12].decode()] += 1
            except OSError as error:
                outcomes[repr(error)] += 1

    with served(tiny_models, workers="2") as service:
        callers = [threading.Thread(target=call, args=(service.port,)) for _ in range(4)]
        for caller in callers:
            caller.start()
        leaving, staying = workers_of(service)
        os.kill(leaving, signal.SIGTERM)
        try:
            until(lambda: not is_running(leaving))
            until(lambda: len(workers_of(service)) == 2, START_LIMIT)
        finally:
            done.set()
        for caller in callers:
            caller.join(LIMIT)
        assert staying in workers_of(service)
    assert set(outcomes) == {"HTTP/1.1 200"}, outcomes


def test_a_worker_whose_decode_never_ends_stops_when_it_is_told(tiny_models: Path) -> None:
    """Told alone, so that nobody will kill it, a worker ends at the drain limit and is replaced."""
    with (
        served(tiny_models, program=("-c", HANGING), workers="2", drain_timeout="0.2") as service,
        connected(service) as connection,
    ):
        hang(service, connection)
        told = workers_of(service)
        for worker in told:
            os.kill(worker, signal.SIGTERM)
        assert until_closed(connection).startswith(b"HTTP/1.1 503")
        until(lambda: not any(map(is_running, told)))
        until(lambda: sum("ended with exit code 0" in line for line in service.log) == 2)


def test_workers_do_not_outlive_the_process_that_keeps_them(tiny_models: Path) -> None:
    """Killed without warning, it leaves workers that answer what they have, tidy up and end."""
    with served(tiny_models, workers="2") as service, connected(service) as connection:
        connection.sendall(HEAD + b"Expect: 100-continue\r\n\r\n")
        assert b"100 Continue" in connection.recv(1000)
        orphans = workers_of(service)
        folder = metrics_folder_of(orphans[0])
        service.process.kill()
        connection.sendall(PNG)
        assert until_closed(connection).startswith(b"HTTP/1.1 200 OK")
        until(lambda: not any(map(is_running, orphans)))
        assert not folder.exists()


def test_a_replaced_worker_serves_what_the_others_do(tmp_path: Path) -> None:
    """A version that came after the start, be it whole or not, is served by none."""
    write_tiny_model(tmp_path, version="1")
    with served(tmp_path, workers="2") as service:
        write_tiny_model(tmp_path, version="2")
        (write_tiny_model(tmp_path, version="3") / "encoder.onnx").write_bytes(b"half a copy")
        dying, _ = workers_of(service)
        os.kill(dying, signal.SIGKILL)
        until(lambda: sum("tiny/1 is ready" in line for line in service.log) == 3, START_LIMIT)
        assert {version_asked(service) for _ in range(4)} == {"1"}  # both workers


# Starts no process while a certain file is there.
SHORT_OF_PROCESSES = """
import asyncio, os, sys
from service import workers
from service.main import main

start = asyncio.create_subprocess_exec

def start_if_possible(*arguments, **options):
    if os.path.exists({file!r}):
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return start(*arguments, **options)

asyncio.create_subprocess_exec = start_if_possible
workers._FIRST_PAUSE = 0.1
sys.exit(main())
"""


def test_a_place_is_kept_while_no_process_can_be_started(tiny_models: Path, tmp_path: Path) -> None:
    """A worker that dies when the system has no room for another is replaced once there is room."""
    shortage = tmp_path / "shortage"
    program = "-c", SHORT_OF_PROCESSES.format(file=str(shortage))
    with served(tiny_models, program=program, workers="2") as service:
        sockets = sockets_of(service.process.pid)
        dying, staying = workers_of(service)
        shortage.touch()
        os.kill(dying, signal.SIGKILL)
        until(lambda: any("cannot be started: [Errno 11]" in line for line in service.log))
        assert service.predict() == "3"
        shortage.unlink()
        until(lambda: len(workers_of(service)) == 2)
        assert staying in workers_of(service)
        until(lambda: sockets_of(service.process.pid) == sockets)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(LIMIT) == 0
    assert not any("Traceback" in line for line in service.log)


def test_a_first_start_without_room_for_processes_fails(tiny_models: Path, tmp_path: Path) -> None:
    """If the system has no room for the first workers, the reason is said once and the exit code is 1."""
    program = SHORT_OF_PROCESSES.format(file=str(tmp_path))
    ended = subprocess.run(  # noqa: S603 # our own interpreter and program
        [sys.executable, "-c", program, "--port", "0"],
        env=environment(tiny_models, workers="2"),
        capture_output=True,
        text=True,
        timeout=START_LIMIT,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr == (
        "capsnet-serve: a worker cannot be started: [Errno 11] Resource temporarily unavailable\n"
    )
