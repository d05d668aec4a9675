"""Request ids, Server-Timing and the access log."""

import asyncio
import logging
import re
from typing import cast

import pytest
from starlette.testclient import TestClient
from starlette.types import Receive, Send

from service.context import Stage
from service.metrics import Metrics
from service.observation import Observation, _server_timing
from tests.api.conftest import Serve, problem
from tests.support.encoded import base64_text, encode
from tests.support.tiny_model import image_of

PNG = encode(image_of(3))
IMAGE = {"content-type": "image/png"}


def test_a_sane_request_id_is_kept(client: TestClient) -> None:
    """The caller's id comes back in the header and in a problem document."""
    answer = client.post("/predict", content=b"x", headers={**IMAGE, "x-request-id": "trace-7:a/b"})
    assert answer.headers["x-request-id"] == "trace-7:a/b"
    assert problem(answer, 422)["request_id"] == "trace-7:a/b"


def test_of_several_request_ids_the_first_counts(client: TestClient) -> None:
    """A proxy that adds an id of its own stands behind the one that named the request."""
    answer = client.get("/livez", headers=[("x-request-id", "a"), ("x-request-id", "b")])
    assert answer.headers["x-request-id"] == "a"


@pytest.mark.parametrize("given", [b"", b"a b", b'a"', b"x" * 129, "é".encode()])
def test_another_request_id_is_replaced(client: TestClient, given: bytes) -> None:
    """What could forge a log line, or is too long, is not repeated."""
    answer = client.get("/livez", headers={b"x-request-id": given})
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


def test_each_request_has_an_id_of_its_own(client: TestClient) -> None:
    """Two requests are told apart, whether or not they succeed."""
    ids = {client.get(path).headers["x-request-id"] for path in ("/livez", "/livez", "/nowhere")}
    assert len(ids) == 3


def test_an_unforeseen_error_has_an_id(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even the answer to a fault of ours carries what to look for in the log, and is counted."""

    def broken(*_: object) -> None:
        raise RuntimeError

    client = serve()
    monkeypatch.setattr(client.app.state.service.engine, "choose", broken)  # type: ignore[attr-defined] # any ASGI
    answer = client.post("/predict", content=PNG, headers=IMAGE)
    assert problem(answer, 500)["request_id"] == answer.headers["x-request-id"]
    assert 'capsnet_requests_total{route="/predict",status="500"} 1.0' in client.get("/metrics").text


def stages(timing: str) -> dict[str, float]:
    """Milliseconds by name."""
    found = dict(entry.split(";dur=") for entry in timing.split(", "))
    return {name: float(spent) for name, spent in found.items()}


def test_server_timing_names_the_stages(client: TestClient) -> None:
    """An answer says how long each stage took; together no longer than the whole."""
    spent = stages(client.post("/predict", content=PNG, headers=IMAGE).headers["server-timing"])
    assert list(spent) == ["image_decode", "queue", "encoder", "decoder", "total"]
    assert sum(spent.values()) - spent["total"] <= spent["total"] + 0.01  # each is rounded
    assert min(spent.values()) >= 0
    capsules = [[1.0] * 16] * 10
    spent = stages(client.post("/reconstruct", json={"capsules": capsules}).headers["server-timing"])
    assert list(spent) == ["queue", "decoder", "total"]
    assert list(stages(client.get("/livez").headers["server-timing"])) == ["total"]


def test_server_timing_is_in_milliseconds() -> None:
    """As browsers read it; what came twice is added up."""
    spent = [Stage("queue", 1, 1.25), Stage("encoder", 2, 2.001), Stage("queue", 3, 3.5)]
    assert _server_timing(spent, 1.5) == "queue;dur=750.000, encoder;dur=1.000, total;dur=1500.000"


@pytest.mark.anyio
async def test_a_request_ends_with_its_answer(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the application does after the last part counts for nothing."""
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)

    async def app(_: object, __: object, send: Send) -> None:
        nonlocal now
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        now += 2
        await send({"type": "http.response.body", "body": b"b"})
        now += 10

    async def send(_: object) -> None:
        pass

    scope = {"type": "http", "method": "GET", "path": "/livez", "headers": []}
    with caplog.at_level(logging.INFO, "service.access"):
        await Observation(app, Metrics(), None, access_log=True)(scope, cast("Receive", None), send)
    assert " in 2.0 s" in caplog.messages[0]


def test_the_access_log_tells_no_content(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """A line has the route, status and time; neither the query, nor a key, nor any of the image."""
    client = serve(access_log=True)
    image = base64_text(PNG)
    with caplog.at_level(logging.INFO, "service.access"):
        client.post(
            "/predict?top_k=4",
            json={"images": [image]},
            headers={"authorization": "Bearer sesame", "x-request-id": "seven"},
        )
        client.get("/no%0Awhere")
    first, second = (record for record in caplog.records if record.name == "service.access")
    assert re.fullmatch(r"testclient POST /predict 200 in [\d.e-]+ s", first.getMessage())
    assert "/no%0Awhere 404" in second.getMessage()
    told = repr(vars(first))
    for secret in ("top_k", "sesame", image[:20]):
        assert secret not in told


def test_the_access_log_cuts_long_paths(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """A caller cannot fill the log with a path; the first 500 characters of it are told."""
    client = serve(access_log=True)
    with caplog.at_level(logging.INFO, "service.access"):
        client.get("/" + 499 * "a")
        client.get("/" + 300 * "é")
    whole, cut = (vars(record)["fields"]["path"] for record in caplog.records)
    assert whole == "/" + 499 * "a"
    assert cut == ("/" + 300 * "%C3%A9")[:500] + "[cut]"
    assert f"GET {cut} 404 in " in caplog.messages[1]


@pytest.mark.anyio
async def test_a_request_without_an_answer_has_no_status(caplog: pytest.LogCaptureFixture) -> None:
    """A line says that it was aborted, as its figure does; status is a number wherever it stands."""

    async def app(*_: object) -> None:
        raise asyncio.CancelledError

    metrics = Metrics()
    observed = Observation(app, metrics, None, access_log=True)
    scope = {"type": "http", "method": "GET", "path": "/livez", "headers": []}
    with caplog.at_level(logging.INFO, "service.access"), pytest.raises(asyncio.CancelledError):
        await observed(scope, cast("Receive", None), cast("Send", None))
    (line,) = caplog.records
    assert "GET /livez aborted in " in line.getMessage()
    fields = vars(line)["fields"]
    assert fields["aborted"] is True
    assert "status" not in fields
    assert b'{route="none",status="aborted"} 1.0' in metrics.exposition("")[0]


def test_the_access_log_is_off_by_default(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    """Without CAPSNET_ACCESS_LOG there is no line."""
    with caplog.at_level(logging.INFO):
        client.get("/livez")
    assert "service.access" not in {record.name for record in caplog.records}
