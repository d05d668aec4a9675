"""When the real process closes connections, and that nobody loses an answer by it."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import httpx2
import numpy as np
import pytest

from service.settings import Settings
from tests.support.encoded import base64_text
from tests.support.process import LIMIT, PNG, Served, connected, served, until, until_closed
from tests.support.tiny_model import image_of

HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
REQUEST = HEAD + b"Content-Length: %d\r\n\r\n" % len(PNG) + PNG
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
CHUNK = b"%x\r\n%s\r\n" % (4096, bytes(4096))


def send_until_closed(connection: socket.socket, data: bytes) -> int:
    """Bytes that went out before the connection was closed."""
    for count in range(1_000_000):
        try:
            connection.sendall(data)
        except ConnectionError:
            return count * len(data)
    raise AssertionError("the connection stays open")


def head_of(connection: socket.socket) -> bytes:
    """An answer's status line and headers, in lower case."""
    received = b""
    while b"\r\n\r\n" not in received:
        part = connection.recv(65536)
        assert part, received
        received += part
    return received.partition(b"\r\n\r\n")[0].lower()


def test_an_endless_body_is_answered_and_cut_off(tiny_models: Path) -> None:
    """A client that never stops sending reads its 413, and then its connection is closed."""
    with served(tiny_models, max_body="65536", body_timeout="2") as service, connected(service) as connection:
        connection.sendall(CHUNKED)
        sent = send_until_closed(connection, CHUNK)
        assert sent < 32 * 2**20  # our limits and the kernel's buffers
        assert service.predict() == "3"


def test_the_answer_to_a_large_body_arrives_whole(tiny_models: Path) -> None:
    """Closing the connection does not overtake the 413, even of a client that sends everything first."""
    with served(tiny_models, max_body="262144") as service:
        for _ in range(20):
            with connected(service) as connection:
                connection.sendall(CHUNKED.replace(b"Host", b"Connection: close\r\nHost"))
                connection.sendall(100 * CHUNK + b"0\r\n\r\n")  # 400 KiB
                answer = until_closed(connection)
            assert answer.startswith(b"HTTP/1.1 413")
            assert answer.endswith(b"}")


def test_a_trickling_body_is_cut_off_in_time(tiny_models: Path) -> None:
    """A byte now and then does not prolong the time that a body has, refused or not."""
    with served(tiny_models, max_body="65536", body_timeout="0.5") as service:
        for prefix in (b"", 17 * CHUNK):  # one that would be welcome, one that is too large already
            with connected(service) as connection:
                connection.sendall(CHUNKED + prefix)
                started = time.monotonic()
                with contextlib.suppress(ConnectionError):
                    while time.monotonic() - started < LIMIT:
                        connection.sendall(b"1\r\nx\r\n")
                        time.sleep(0.05)
                assert time.monotonic() - started < 3


def test_a_request_ends_with_its_answer(tiny_models: Path) -> None:
    """One that was refused before its body came is counted at once, and not until the body is given up."""
    with served(tiny_models, body_timeout="60") as service, connected(service) as connection:
        connection.sendall(HEAD + b"Content-Length: 99999999\r\n\r\n")
        assert b"413" in head_of(connection)
        deadline = time.monotonic() + LIMIT
        while "capsnet_requests_in_flight 1.0\n" not in (figures := service.client.get("/metrics").text):
            assert time.monotonic() < deadline  # the one that asks is in flight
        assert 'capsnet_requests_total{route="/predict",status="413"} 1.0\n' in figures


@pytest.mark.parametrize("workers", ["1", "2"])
def test_what_is_no_request_counts_as_one(tiny_models: Path, workers: str) -> None:
    """Where TLS is spoken to it, or an unknown method used, an operator sees 400s of no route."""
    with served(tiny_models, workers=workers) as service:
        for sent in (b"\x16\x03\x01\x02\x00", b"BREW /predict HTTP/1.1\r\nHost: x\r\n\r\n"):
            with connected(service) as connection:
                connection.sendall(sent)
                assert b" 400 " in head_of(connection)
        figures = service.client.get("/metrics").text
    assert 'capsnet_requests_total{route="none",status="400"} 2.0\n' in figures
    assert "127.0.0.1 sent what cannot be read as an HTTP request (0 more" in "".join(service.log)


def test_half_heads_hold_up_nobody(tiny_models: Path) -> None:
    """A connection without a whole request head is closed in time, new or kept, however its bytes trickle."""
    with served(tiny_models, head_timeout="2") as service, contextlib.ExitStack() as stack:
        silent, halves, kept, blank = (
            [stack.enter_context(connected(service)) for _ in range(25)] for _ in range(4)
        )
        for connection in halves:
            connection.sendall(HEAD)
        for connection in kept:
            connection.sendall(REQUEST)
            assert b"200 ok" in head_of(connection)
            connection.sendall(HEAD)
        started = time.monotonic()
        assert service.predict() == "3"
        for trickling in blank:
            while time.monotonic() - started < LIMIT:
                try:
                    trickling.sendall(b"\r\n")
                except ConnectionError:
                    break
                time.sleep(0.02)
        for connection in (*silent, *halves, *kept):
            with contextlib.suppress(ConnectionResetError):
                until_closed(connection)
        assert time.monotonic() - started < LIMIT


def test_a_kept_connection_outlives_the_time_for_a_head(tiny_models: Path) -> None:
    """Between requests, and during one, the time for a head does not run."""
    with served(tiny_models, head_timeout="0.5") as service, connected(service) as connection:
        for _ in range(2):
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(PNG) + PNG[:20])
            time.sleep(0.8)
            connection.sendall(PNG[20:])
            assert b"200 ok" in head_of(connection)
            time.sleep(0.8)


def test_slow_bodies_hold_up_nobody(tiny_models: Path) -> None:
    """With a hundred half-sent bodies open, others are served at once; each slow one gets a 408."""
    with served(tiny_models, body_timeout="2") as service, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connected(service)) for _ in range(100)]
        for connection in slow:
            connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\nx")
        started = time.monotonic()
        assert service.predict() == "3"
        assert time.monotonic() - started < 1
        for connection in slow:
            answer = until_closed(connection)
            assert answer.startswith(b"HTTP/1.1 408")
            assert b"connection: close" in answer


def test_an_idle_connection_is_kept_as_long_as_the_settings_say(tiny_models: Path) -> None:
    """For that time it serves another request; then it is closed. By default it outlives a proxy's pool."""
    with served(tiny_models, keep_alive="1") as service, connected(service) as connection:
        for pause in (0.5, 0):
            connection.sendall(REQUEST)
            assert b"200 ok" in head_of(connection)
            time.sleep(pause)
        started = time.monotonic()
        until_closed(connection)
        assert 0.5 < time.monotonic() - started < 4  # uvicorn's own limit is 5
    assert Settings().keep_alive > 60


def test_who_takes_no_answers_is_cut_off(tiny_models: Path) -> None:
    """A client that asks and asks and reads nothing loses its connection, and the log says so."""
    body = io.BytesIO()
    np.save(body, np.tile(image_of(3), (1000, 1, 1)))
    head = b"POST /predict?capsules=true HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-npy\r\n"
    request = head + b"Content-Length: %d\r\n\r\n" % body.tell() + body.getvalue()
    count = 20  # for 20 MB
    with served(tiny_models, answer_timeout="0.5") as service, connected(service) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)  # or the system would take it all
        with contextlib.suppress(ConnectionError):
            connection.sendall(count * request)
        until(lambda: "its client did not take an answer within 0.5 s" in "".join(service.log))
        with contextlib.suppress(ConnectionError):
            assert until_closed(connection).count(b"HTTP/1.1 200 OK") < count
        assert service.predict() == "3"


def test_answers_that_nobody_takes_have_one_room(tiny_models: Path) -> None:
    """Where those of all clients together would be more than it holds, a connection is cut without delay."""
    image = base64_text(PNG)
    body = json.dumps({"image": image, "deltas": [0] * 64}).encode()
    head = b"POST /reconstruct/sweep HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    request = head + b"Accept: application/x-npz\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with (
        served(tiny_models, max_body="65536", max_bodies="65536", answer_timeout="60") as service,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(3):
            connection = stack.enter_context(connected(service))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            connection.sendall(4 * request)  # for 13 MB, or the system would take it all
        until(lambda: "cut: answers that are not taken yet of 65536 bytes at most" in "".join(service.log))
        assert service.predict() == "3"


def test_requests_without_end_in_one_go_take_bounded_memory(tiny_models: Path) -> None:
    """Of a client that sends requests and reads no answer, no more are read than have their turn soon."""
    requests = b"GET /livez HTTP/1.1\r\nHost: it\r\n\r\n" * 2_000
    with served(tiny_models) as process, connected(process) as client:
        before = process.peak_memory()
        client.settimeout(1)
        with contextlib.suppress(TimeoutError):
            for _ in range(200):  # 14 MB
                client.sendall(requests)
        assert process.peak_memory() - before < 64 * 2**20


@pytest.mark.parametrize("path", ["/livez", "/models", "/docs", "/metrics", "/v2/health/ready"])
def test_no_body_comes_after_head(tiny_models: Path, path: str) -> None:
    """What comes after an answer to HEAD is the answer to the next request, and GET's length is told."""
    with served(tiny_models) as service, connected(service) as connection:
        head, get = (f"{method} {path} HTTP/1.1\r\nHost: x\r\n" for method in ("HEAD", "GET"))
        connection.sendall(f"{head}\r\n".encode())
        assert re.search(rb"^http/1.1 200 .*content-length: [1-9]", head_of(connection), re.DOTALL)
        connection.sendall(f"{get}Connection: close\r\n\r\n".encode())
        assert until_closed(connection).startswith(b"HTTP/1.1 200 OK")


def test_an_ordinary_connection_is_kept(tiny_models: Path) -> None:
    """Once a body has been read, its connection serves the next request, whatever the answer."""
    with served(tiny_models) as service, connected(service) as connection:
        for body in (PNG, b"no image", PNG):
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert b"connection: close" not in head_of(connection)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_connections_in_the_backlog_at_sigterm_are_served(tiny_models: Path, workers: str) -> None:
    """What the kernel had accepted before the signal is answered, though the process had not seen it."""
    with served(tiny_models, workers=workers) as service, contextlib.ExitStack() as stack:
        os.kill(service.process.pid, signal.SIGSTOP)
        waiting = [stack.enter_context(connected(service)) for _ in range(50)]
        for connection in waiting[:25]:
            connection.sendall(REQUEST)
        service.process.send_signal(signal.SIGTERM)
        os.kill(service.process.pid, signal.SIGCONT)
        for connection in waiting[25:]:
            connection.sendall(REQUEST)
        for connection in waiting:
            answer = until_closed(connection)
            assert answer.startswith(b"HTTP/1.1 200 OK")
            assert b"connection: close" in answer
        assert service.process.wait(LIMIT) == 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_no_request_is_lost_at_sigterm_under_load(tiny_models: Path, workers: str) -> None:
    """Of clients that connect for each request, each is answered or refused, and none cut off."""
    outcomes: Counter[str] = Counter()

    def call(port: int) -> None:
        while True:
            try:
                connection = socket.create_connection(("127.0.0.1", port), timeout=LIMIT)
            except ConnectionRefusedError:
                outcomes["refused"] += 1
                return
            with connection:
                try:
                    connection.sendall(REQUEST.replace(b"Host", b"Connection: close\r\nHost"))
                    outcomes[until_closed(connection)[:12].decode()] += 1
                except OSError as error:
                    outcomes[repr(error)] += 1

    with served(tiny_models, workers=workers) as service:
        callers = [threading.Thread(target=call, args=(service.port,)) for _ in range(8)]
        for caller in callers:
            caller.start()
        time.sleep(0.5)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(LIMIT) == 0
        for caller in callers:
            caller.join(LIMIT)
    assert set(outcomes) == {"HTTP/1.1 200", "refused"}, outcomes
    assert outcomes["refused"] == len(callers)


def test_a_resting_client_is_heard_at_a_stop(tiny_models: Path) -> None:
    """What a client sends after a refusal, while its connection rests, is answered when the service stops."""
    file = io.BytesIO()
    np.save(file, np.stack([image_of(3)] * 50_000))
    bulk = file.getvalue()  # always one row of it waits: nobody else is admitted
    with served(
        tiny_models, max_batch="1", queue_length="1", max_images="100000", max_body="100000000"
    ) as service:
        asked = threading.Thread(target=ask, args=(service, bulk))
        asked.start()
        with connected(service) as connection:
            for _ in range(1000):
                connection.sendall(REQUEST)
                head = head_of(connection)
                if b" 503 " in head:
                    break
            assert b"retry-after" in head
            connection.sendall(REQUEST)
            service.process.send_signal(signal.SIGTERM)
            answer = until_closed(connection)
        asked.join(LIMIT)
    assert b"HTTP/1.1 200" in answer or b"HTTP/1.1 503" in answer


def ask(service: Served, bulk: bytes) -> None:
    with contextlib.suppress(httpx2.HTTPError):
        service.client.post("/predict", content=bulk, headers={"content-type": "application/x-npy"})
