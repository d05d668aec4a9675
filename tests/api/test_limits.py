"""Overload, time limits, slow and vanishing callers, and failures of our own."""

import asyncio
import gzip
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from service.app import create_app
from service.batching import Arrays, Batcher
from service.context import REFUSED
from service.errors import InvalidInput
from service.handling import Service
from service.settings import Settings
from tests.api.conftest import problem
from tests.support.encoded import base64_text, encode, npy
from tests.support.tiny_model import image_of

pytestmark = pytest.mark.anyio

PNG = encode(image_of(3))
IMAGE = {"content-type": "image/png"}
LIMIT = 10.0  # seconds after which a test that hangs has failed


class Running:
    """A service on the test's own event loop, whose encoder waits while `go_on` is cleared."""

    def __init__(self, app: FastAPI) -> None:
        service: Service = app.state.service
        self.app = app
        self.engine = service.engine
        self.encoder: Batcher = service.engine.default._encoder
        self.go_on = threading.Event()
        self.go_on.set()
        self.started = threading.Semaphore(0)
        self.rows: list[int] = []
        self._run: Callable[[Arrays], Arrays] = self.encoder._run
        self.encoder._run = self._wait_and_run
        self.raised: list[Exception] = []  # what reached the server, which closes the connection then
        self.rests: list[bool] = []  # of each request that has ended, whether its connection rests then
        transport = httpx2.ASGITransport(app=self._serve, raise_app_exceptions=False)
        self.client = httpx2.AsyncClient(transport=transport, base_url="http://test")

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self.app(scope, receive, send)
        except Exception as error:
            self.raised.append(error)
            raise
        finally:
            self.rests.append(REFUSED in scope.get("state", ()))

    def _wait_and_run(self, inputs: Arrays) -> Arrays:
        self.rows.append(len(inputs[0]))
        self.started.release()
        assert self.go_on.wait(LIMIT)
        return self._run(inputs)

    def predict(self) -> asyncio.Task[httpx2.Response]:
        return asyncio.create_task(self.client.post("/predict", content=PNG, headers=IMAGE))

    async def busy(self) -> asyncio.Task[httpx2.Response]:
        """A request that keeps the encoder busy until it may go on."""
        self.go_on.clear()
        task = self.predict()
        assert await asyncio.to_thread(self.started.acquire, timeout=LIMIT)
        return task

    async def waiting(self, rows: int) -> None:
        """Return when this many rows wait for the encoder."""
        while self.encoder.depth != rows:
            await asyncio.sleep(0)


def broken(*_: object) -> Any:
    """Fails in place of anything of ours."""
    raise RuntimeError("/secret/path is broken")


@asynccontextmanager
async def running(models: Path, **changes: Any) -> AsyncIterator[Running]:
    values = {"models": models, "device": "cpu", "default_model": "tiny", **changes}
    app = create_app(Settings.model_validate(values))
    async with asyncio.timeout(LIMIT) as limit, app.router.lifespan_context(app):
        service = Running(app)
        try:
            yield service
        finally:
            service.go_on.set()
        assert not limit.expired()  # a request that swallowed the cancellation would hide it


async def test_overload_is_refused_at_once(tiny_models: Path) -> None:
    """With the queue full the next request gets 503 and Retry-After while the others are still served."""
    async with running(tiny_models, max_batch=2, queue_length=2) as service:
        admitted = [await service.busy(), service.predict(), service.predict()]
        await service.waiting(2)
        refused = await service.predict()
        problem(refused, 503)
        assert int(refused.headers["retry-after"]) >= 1
        service.go_on.set()
        assert [(await task).status_code for task in admitted] == [200, 200, 200]
        assert (await service.predict()).status_code == 200


async def test_who_is_refused_for_overload_rests(tiny_models: Path) -> None:
    """The server reads from that connection a little later; after any other answer it reads on."""
    async with running(tiny_models, max_batch=1, queue_length=1) as service:
        admitted = [await service.busy(), service.predict()]
        await service.waiting(1)
        problem(await service.predict(), 503)
        assert service.rests == [True]
        service.go_on.set()
        await asyncio.gather(*admitted)
        problem(await service.client.post("/predict", content=b"no image", headers=IMAGE), 422)
        assert service.rests == [True, False, False, False]


async def test_health_answers_while_the_device_is_busy(tiny_models: Path) -> None:
    """A busy device holds up neither liveness nor readiness."""
    async with running(tiny_models) as service:
        await service.busy()
        assert (await service.client.get("/livez")).status_code == 200
        assert (await service.client.get("/readyz")).status_code == 200


@pytest.mark.parametrize(
    ("path", "kind", "parser"),
    [
        *[
            (path, kind, f"routes.parse_{kind}")
            for path in ("/predict", "/reconstruct", "/reconstruct/sweep")
            for kind in ("json", "multipart")
        ],
        ("/v2/models/tiny-encoder/infer", "json", "oip._parse"),
    ],
)
async def test_health_answers_while_a_large_body_is_parsed(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch, path: str, kind: str, parser: str
) -> None:
    """Only small bodies are parsed on the event loop."""
    go_on, started = threading.Event(), threading.Event()

    def wait(*_: object, **__: object) -> Any:
        started.set()
        assert go_on.wait(LIMIT / 2)
        raise InvalidInput("Too long.", received="this", expected="that")

    monkeypatch.setattr(f"service.{parser}", wait)
    async with running(tiny_models) as service:
        media_type = {"json": "application/json", "multipart": "multipart/form-data; boundary=x"}[kind]
        post = service.client.post(path, content=bytes(40_000), headers={"content-type": media_type})
        answer = asyncio.create_task(post)
        assert await asyncio.to_thread(started.wait, LIMIT)
        assert (await service.client.get("/livez")).status_code == 200
        go_on.set()
        refused = await answer
        assert refused.status_code == (400 if path.startswith("/v2") else 422)
        assert "Too long" in refused.text


async def test_overload_is_refused_before_anything_is_decoded(tiny_models: Path) -> None:
    """With the queue full not even a broken image is looked at."""
    async with running(tiny_models, max_batch=1, queue_length=1) as service:
        first = await service.busy()
        second = service.predict()
        await service.waiting(1)
        for path, body, kind in (
            ("/predict", b"broken", "image/png"),
            ("/reconstruct", b'{"image": "QUJD"}', "application/json"),
        ):
            refused = await service.client.post(path, content=body, headers={"content-type": kind})
            problem(refused, 503)
            assert refused.headers["retry-after"]
        service.go_on.set()
        assert [(await task).status_code for task in (first, second)] == [200, 200]


async def test_an_answer_that_takes_too_long_is_a_503(tiny_models: Path) -> None:
    """At the request's time limit its caller is told when to try again, and its rows leave the queue."""
    async with running(tiny_models, request_timeout=0.05) as service:
        first = await service.busy()
        second = service.predict()
        for task in (first, second):
            answer = await task
            problem(answer, 503)
            assert answer.headers["retry-after"] == "1"
        assert service.encoder.depth == 0
        service.go_on.set()
    assert service.rows == [1]


async def test_a_failing_model_is_a_500_without_its_insides(tiny_models: Path) -> None:
    """What the runtime complains of is logged and not told, and the connection serves the next request."""
    async with running(tiny_models) as service:
        healthy = service._run
        service._run = broken
        answer = await service.predict()
        assert "secret" not in answer.text
        problem(answer, 500)
        assert service.raised == []
        assert "connection" not in answer.headers
        service._run = healthy
        assert (await service.predict()).status_code == 200


READY = ["/readyz", "/v2/health/ready", "/v2/models/tiny-encoder/ready", "/v2/models/tiny-decoder/ready"]


async def statuses(service: Running, paths: Iterable[str]) -> set[int]:
    return {(await service.client.get(path)).status_code for path in paths}


async def test_failing_runs_make_it_unready_until_one_succeeds(tiny_models: Path) -> None:
    """After three failures in a row readiness fails; asking for it finds out that it works again."""
    async with running(tiny_models) as service:
        healthy = service._run
        service._run = broken
        for _ in range(2):
            problem(await service.predict(), 500)
        assert await statuses(service, READY) == {200}
        problem(await service.predict(), 500)
        assert await statuses(service, READY) == {503}
        assert "not-working" in problem(await service.client.get("/readyz"), 503)["type"]
        assert await statuses(service, ["/livez", "/v2/health/live", "/v2/models/colour-encoder/ready"]) == {
            200
        }
        service._run = healthy
        while await statuses(service, READY) != {200}:
            await asyncio.sleep(0.01)


async def test_a_run_that_does_not_end_makes_it_unready(tiny_models: Path) -> None:
    """Beyond the time that a request has, readiness fails; it is back when the run has ended."""
    async with running(tiny_models, request_timeout=0.1) as service:
        problem(await (await service.busy()), 503)
        await asyncio.sleep(0.05)  # the run began after the request did
        assert await statuses(service, READY) == {503}
        assert await statuses(service, ["/livez"]) == {200}
        service.go_on.set()
        while await statuses(service, READY) != {200}:
            await asyncio.sleep(0.01)
    assert service.rows == [1, 1]  # of many who asked, one set off a trial


async def test_an_unforeseen_error_is_a_500_without_its_insides(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault in our own code is a problem document too, and says that the server then hangs up."""
    async with running(tiny_models) as service:
        monkeypatch.setattr(service.engine, "choose", broken)
        monkeypatch.setattr(type(service.engine), "default", property(broken))
        for answer in (await service.predict(), await service.client.get("/models")):
            assert "secret" not in answer.text
            problem(answer, 500)
            assert "close" in answer.headers["connection"]
        assert [type(error) for error in service.raised] == [RuntimeError, RuntimeError]


async def ask(
    app: FastAPI, messages: Iterable[dict[str, Any]], headers: Iterable[tuple[bytes, bytes]] = ()
) -> tuple[int, int]:
    """POST /predict by hand: the status, and how many messages were taken; after the last, silence."""
    taken, status = 0, 0
    pending = iter(messages)

    async def receive() -> dict[str, Any]:
        nonlocal taken
        message = next(pending, None)
        if message is None:
            await asyncio.Event().wait()
            raise AssertionError
        taken += 1
        return message

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/predict",
        "query_string": b"",
        "headers": [(b"content-type", b"image/png"), *headers],
    }
    await app(scope, receive, send)  # type: ignore[arg-type] # narrower than ASGI's any mapping
    return status, taken


def chunk(size: int, *, more: bool) -> dict[str, Any]:
    return {"type": "http.request", "body": bytes(size), "more_body": more}


async def test_a_body_over_the_limit_is_never_held(tiny_models: Path) -> None:
    """Without Content-Length the answer comes with the chunk that exceeds the limit.

    As much again is thrown away, and no more.
    """
    async with running(tiny_models, max_body=10_000) as service:
        endless = (chunk(1000, more=True) for _ in range(10**9))
        chunked = [(b"transfer-encoding", b"chunked")]
        assert await ask(service.app, endless, chunked) == (413, 11 + 10)


async def test_a_body_of_exactly_the_limit_is_read(tiny_models: Path) -> None:
    """The limit itself is not over the limit: this one fails only as an image."""
    async with running(tiny_models, max_body=10_000) as service:
        body = [chunk(5000, more=True), chunk(5000, more=False)]
        assert await ask(service.app, body) == (422, 2)
        assert await ask(service.app, body, [(b"content-length", b"10000")]) == (422, 2)


async def test_a_declared_length_over_the_limit_is_refused_unread(tiny_models: Path) -> None:
    """By its Content-Length a body is refused before a byte of it is read."""
    async with running(tiny_models, max_body=10_000, body_timeout=0.05) as service:
        assert await ask(service.app, [], [(b"content-length", b"10001")]) == (413, 0)
        assert await ask(service.app, [], [(b"content-length", b"9" * 30)]) == (413, 0)


@pytest.mark.parametrize(
    "path", ["/predict", "/reconstruct", "/reconstruct/sweep", "/v2/models/tiny-encoder/infer"]
)
async def test_all_bodies_together_have_a_limit(tiny_models: Path, path: str) -> None:
    """A body that would exceed it is refused with 503 and Retry-After, until one of the others has ended."""
    async with running(tiny_models, max_body=6000, max_bodies=10_000, body_timeout=0.3) as service:
        room = service.app.state.service.body_room
        first = asyncio.create_task(ask(service.app, [chunk(6000, more=True)]))
        while room.taken != 6000:
            await asyncio.sleep(0)
        kind = {"content-type": "application/json"}
        refused = await service.client.post(path, content=bytes(4001), headers=kind)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert (await service.client.post(path, content=bytes(4000), headers=kind)).status_code == 400
        assert room.taken == 6000
        assert (await first)[0] == 408
        assert (await service.client.post(path, content=bytes(4001), headers=kind)).status_code == 400
        assert room.taken == 0


async def test_what_a_body_inflates_to_counts(tiny_models: Path) -> None:
    """A small compressed body takes as much room as what comes out of it."""
    async with running(tiny_models, max_body=6000, max_bodies=10_000, body_timeout=0.3) as service:
        first = asyncio.create_task(ask(service.app, [chunk(5000, more=True)]))
        headers = {**IMAGE, "content-encoding": "gzip"}
        for size, status in ((5001, 503), (5000, 422)):
            body = gzip.compress(bytes(size))
            answer = await service.client.post("/predict", content=body, headers=headers)
            assert answer.status_code == status
        await first


async def test_every_end_of_a_request_gives_back_its_room(tiny_models: Path) -> None:
    """Answered, refused, timed out, left or cancelled: afterwards there is as much room as before."""
    async with running(tiny_models, max_body=6000, body_timeout=0.05, request_timeout=0.2) as service:
        room = service.app.state.service.body_room
        for messages, status in (
            ([{"type": "http.request", "body": PNG}], 200),
            ([chunk(5000, more=False)], 422),
            ([chunk(5000, more=True)], 408),
            ([chunk(5000, more=True), chunk(5000, more=True), chunk(0, more=False)], 413),
            ([chunk(5000, more=True), {"type": "http.disconnect"}], 499),
        ):
            assert (await ask(service.app, messages))[0] == status
            assert room.taken == 0
        problem(await (await service.busy()), 503)
        assert room.taken == 0
        cancelled = asyncio.create_task(ask(service.app, [chunk(5000, more=True)]))
        while not room.taken:
            await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.wait([cancelled])
        assert room.taken == 0


async def test_a_body_that_does_not_arrive_is_a_408(tiny_models: Path) -> None:
    """A half-sent body holds nothing longer than its time limit."""
    async with running(tiny_models, body_timeout=0.05) as service:
        assert await ask(service.app, [chunk(10, more=True)]) == (408, 1)


async def test_a_caller_that_leaves_while_sending_harms_nothing(tiny_models: Path) -> None:
    """A disconnect in the middle of a body ends the request without an error of ours."""
    async with running(tiny_models) as service:
        status, _ = await ask(service.app, [chunk(10, more=True), {"type": "http.disconnect"}])
        assert status == 499
        assert (await service.predict()).status_code == 200


async def test_a_caller_that_leaves_while_waiting_is_not_computed(tiny_models: Path) -> None:
    """A disconnect takes the request's rows out of the queue; the neighbours are served."""
    async with running(tiny_models) as service:
        first = await service.busy()
        left = asyncio.Event()

        async def body_then_leave() -> AsyncIterator[dict[str, Any]]:
            yield {"type": "http.request", "body": PNG, "more_body": False}
            await left.wait()
            yield {"type": "http.disconnect"}

        messages = body_then_leave()
        statuses = []

        async def send(message: dict[str, Any]) -> None:
            statuses.append(message.get("status"))

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/predict",
            "query_string": b"",
            "headers": [(b"content-type", b"image/png")],
        }
        leaving = asyncio.create_task(
            service.app(scope, messages.__anext__, send)  # type: ignore[arg-type] # narrower than ASGI
        )
        await service.waiting(1)
        neighbour = service.predict()
        await service.waiting(2)
        left.set()
        await leaving
        assert statuses[0] == 499
        assert service.encoder.depth == 1
        service.go_on.set()
        assert (await first).status_code == (await neighbour).status_code == 200
    assert service.rows == [1, 1]


async def test_a_closing_engine_answers_everyone(tiny_models: Path) -> None:
    """Requests that cannot be finished in time get 503 and not a broken connection."""
    async with running(tiny_models) as service:
        tasks = [await service.busy(), service.predict()]
        await service.waiting(1)
        await service.engine.close(0)
        for task in tasks:
            assert "shutting-down" in problem(await task, 503)["type"]


async def test_the_number_of_images_has_a_limit_in_every_form(tiny_models: Path) -> None:
    """As many images as allowed pass as npy, form and JSON; one more does not."""
    async with running(tiny_models, max_images=3) as service:
        for count, status in ((3, 200), (4, 413)):
            bodies: list[dict[str, Any]] = [
                {
                    "content": npy(image_of(0)[None].repeat(count, 0)),
                    "headers": {"content-type": "application/x-npy"},
                },
                {"files": [("images", ("a.png", PNG, "image/png"))] * count},
                {"json": {"images": [base64_text(PNG)] * count}},
            ]
            for body in bodies:
                assert (await service.client.post("/predict", **body)).status_code == status


def test_a_json_text_may_have_as_many_images_as_the_limit_says(serve: Callable[..., TestClient]) -> None:
    """However many the limit allows, each may be a data URL: all are read up to the last, which is broken."""
    urls = [f"data:image/png;base64,{text}" for text in [*["AAAA"] * 19_999, "%"]]
    answer = serve(max_images=20_000).post("/predict", json={"images": urls})
    assert "Image 19999" in problem(answer, 422)["detail"]


def test_the_models_own_deltas_are_never_too_many(serve: Callable[..., TestClient]) -> None:
    """Who sends no deltas has not sent too many of them, however few the settings allow."""
    client = serve(max_deltas=3)
    image = base64_text(encode(image_of(1)))
    assert len(client.post("/reconstruct/sweep", json={"image": image}).json()["deltas"]) == 11
    problem(client.post("/reconstruct/sweep", json={"image": image, "deltas": [0, 0, 0, 0]}), 422)
