"""API keys, CORS, security headers, and documentation that asks nobody else."""

import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from service.settings import Settings
from tests.api.conftest import Serve, problem
from tests.api.test_process import start
from tests.support.encoded import encode
from tests.support.process import served
from tests.support.tiny_model import image_of

PNG = encode(image_of(3))
IMAGE = {"content-type": "image/png"}
KEY = "sesame-sesame-sesame"
ROOT = Path(__file__).parents[2]
OTHER = "another-key-another-key"
KEYED = {"x-api-key": KEY}


@pytest.fixture
def guarded(serve: Serve) -> TestClient:
    return serve(api_keys=f"{KEY}, {OTHER}")


@pytest.mark.parametrize("given", [KEYED, {"authorization": f"Bearer {OTHER}"}])
def test_a_valid_key_admits(guarded: TestClient, given: dict[str, str]) -> None:
    """Each of several keys is admitted, in either header."""
    assert guarded.post("/predict", content=PNG, headers={**IMAGE, **given}).status_code == 200


@pytest.mark.parametrize(
    "path", ["/predict", "/models", "/v2", "/metrics", "/nowhere", "//livez", "/docs/../models"]
)
def test_without_a_key_there_is_only_a_401(guarded: TestClient, path: str) -> None:
    """Whether a path is there, nobody learns without a key."""
    whole = f"http://testserver{path}"  # or //livez would be a host
    answer = guarded.get(whole, headers={"authorization": "Bearer wrong"})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"]
    assert KEY not in answer.text


def test_the_refusal_is_a_problem_document(guarded: TestClient) -> None:
    """It says what is missing and in which headers it goes."""
    document = problem(guarded.post("/predict", content=PNG, headers=IMAGE), 401)
    assert "X-API-Key" in document["expected"]


def test_a_refusal_counts_under_the_route_that_was_asked_for(guarded: TestClient) -> None:
    """Callers that lack a key are told apart from a scan of paths, and can make up no route."""
    for path in ("/v2/models/a", "/v2/models/b", "/nowhere", "/predict/"):
        guarded.get(path)
    guarded.post("/predict", content=PNG, headers=IMAGE)
    lines = guarded.get("/metrics", headers=KEYED).text.splitlines()
    counts = [line.partition("_total")[2] for line in lines if line.startswith("capsnet_requests_total")]
    assert sorted(counts) == [
        '{route="/predict",status="401"} 1.0',
        '{route="/v2/models/{name}",status="401"} 2.0',
        '{route="none",status="401"} 2.0',
    ]


def test_health_and_documentation_are_open(guarded: TestClient) -> None:
    """An orchestrator's probes and a newcomer's browser need no key."""
    for path in ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/", "/docs", "/openapi.json"):
        assert guarded.get(path).status_code == 200


def test_health_and_metrics_are_configured_apart(serve: Serve) -> None:
    """Each can be opened or closed on its own."""
    client = serve(api_keys=KEY, health_needs_key=True, metrics_needs_key=False)
    assert client.get("/livez").status_code == 401
    assert client.get("/livez", headers=KEYED).status_code == 200
    assert client.get("/metrics").status_code == 200


def test_keys_are_nowhere_to_be_read(guarded: TestClient) -> None:
    """Neither /models, /metrics nor the settings themselves show one."""
    for path in ("/models", "/metrics", "/openapi.json"):
        assert KEY not in guarded.get(path, headers=KEYED).text
    assert KEY not in repr(Settings(api_keys=KEY))


def test_a_refused_key_is_not_repeated(tiny_models: Path) -> None:
    """A key that is too short stops the start, and the line does not show it."""
    ended = start(tiny_models, api_keys="short-secret")
    assert ended.returncode == 2
    assert ended.stderr.startswith("capsnet-serve: CAPSNET_API_KEYS: ")
    assert "at least 16 characters" in ended.stderr
    assert "short-secret" not in ended.stderr


def test_settings_that_contradict_one_another_repeat_no_key(tiny_models: Path) -> None:
    """The line that says which settings do not go together shows none of their values."""
    ended = start(tiny_models, api_keys=KEY, max_batch="512")
    assert ended.returncode == 2
    assert "queue_length must be at least max_batch" in ended.stderr
    assert KEY not in ended.stderr


def test_keys_that_are_none_stop_the_start(tiny_models: Path) -> None:
    """Who sets keys and names none is told, instead of serving everybody."""
    ended = start(tiny_models, api_keys=" , ")
    assert ended.returncode == 2
    assert "CAPSNET_API_KEYS: Value error, there is nothing between the commas" in ended.stderr


@pytest.mark.parametrize("keys", ["", KEY])
def test_the_start_says_who_may_call(tiny_models: Path, keys: str) -> None:
    """An operator sees in the log whether keys are asked for, and that a misspelt variable has no effect."""
    with served(tiny_models, api_keys=keys, api_key=KEY) as service:
        log = "".join(service.log)
    assert ("for who has an API key," if keys else "for everybody,") in log
    assert "CAPSNET_API_KEY is no setting and has no effect; CAPSNET_API_KEYS is" in log
    assert KEY not in log


def test_the_document_tells_of_keys_where_they_are_needed(guarded: TestClient, client: TestClient) -> None:
    """The schemes and the 401 are documented with keys, and without keys are not."""
    document = guarded.get("/openapi.json").json()
    assert set(document["components"]["securitySchemes"]) == {"bearer", "header"}
    predict = document["paths"]["/predict"]["post"]
    assert predict["security"] == [{"bearer": []}, {"header": []}]
    assert "401" in predict["responses"]
    assert "security" not in document["paths"]["/livez"]["get"]
    plain = client.get("/openapi.json").json()
    assert "securitySchemes" not in plain["components"]
    assert "401" not in plain["paths"]["/predict"]["post"]["responses"]


PREFLIGHT = {"origin": "https://a.example", "access-control-request-method": "POST"}


def test_no_origin_may_call_by_default(client: TestClient) -> None:
    """Without CAPSNET_CORS_ORIGINS a browser lets no other page read an answer."""
    assert client.options("/predict", headers=PREFLIGHT).status_code == 405
    assert "access-control-allow-origin" not in client.get("/livez", headers=PREFLIGHT).headers


def test_named_origins_may_call(serve: Serve) -> None:
    """A preflight needs no key; what follows does, and its refusal can be read by the page."""
    client = serve(api_keys=KEY, cors_origins="https://a.example,https://b.example")
    length = "Inference-Header-Content-Length"
    trace = "traceparent,tracestate"
    asked = f"authorization,content-encoding,content-type,{length.lower()},{trace},x-api-key,x-request-id"
    preflight = client.options("/predict", headers={**PREFLIGHT, "access-control-request-headers": asked})
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://a.example"
    assert preflight.headers["access-control-allow-methods"] == "GET, HEAD, POST"
    refused = client.get("/models", headers={"origin": "https://b.example"})
    exposed = set(refused.headers["access-control-expose-headers"].split(", "))
    assert exposed >= client.get("/openapi.json").json()["components"]["headers"].keys() | {length}
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://b.example")
    other = client.get("/livez", headers={"origin": "https://c.example"})
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("path", ["/livez", "/", "/docs", "/nowhere"])
def test_every_answer_keeps_browsers_careful(client: TestClient, path: str) -> None:
    """No sniffing, no framing, no foreign scripts or forms, no referrer."""
    headers = client.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    policy = headers["content-security-policy"]
    rules = {"default-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"}
    rules |= {"img-src 'self' blob: data:", "style-src 'self' 'unsafe-inline'"}
    assert rules == set(policy.split("; "))
    assert "script-src" not in policy, "scripts fall under default-src: no inline script, no eval"


@pytest.mark.parametrize(("page", "folder", "count"), [("/", "playground", 2), ("/docs", "docs", 3)])
def test_pages_come_from_here_alone(guarded: TestClient, page: str, folder: str, count: int) -> None:
    """Every script and style that they name is served by us, without a key; none stands in the page."""
    text = guarded.get(page).text
    assert "://" not in text
    assert not re.search(r"<script(?![^>]*\bsrc=)", text)
    assert not re.search(r"<style|\bstyle=|\bon[a-z]+=", text)
    names = re.findall(rf'(?:src|href)="({folder}/[^"]+)"', text)
    assert len(names) == count
    for name in names:
        answer = guarded.get(f"/{name}")
        assert answer.status_code == 200
        assert "javascript" in answer.headers["content-type"] or "css" in answer.headers["content-type"]


def test_every_file_of_the_playground_is_served(guarded: TestClient) -> None:
    """The page's scripts find what they import."""
    files = sorted((ROOT / "service/web/playground").iterdir())
    assert len(files) > 2
    for file in files:
        path = "/" if file.name == "index.html" else f"/playground/{file.name}"
        assert guarded.get(path).content == file.read_bytes()


def test_a_page_is_asked_for_again_but_sent_once(client: TestClient) -> None:
    """A browser never meets scripts of another release than the page's, and loads nothing twice."""
    first = client.get("/playground/pad.js")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get("/playground/pad.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("part", ["items=0-1", "bytes=0-1", "bytes=x", "nonsense"])
def test_a_page_is_sent_whole(client: TestClient, part: str) -> None:
    """A part of it is sent to nobody, and who asks for one, in whatever unit, gets the page."""
    whole = client.get("/playground/pad.js")
    answer = client.get("/playground/pad.js", headers={"range": part})
    assert (answer.status_code, answer.content) == (200, whole.content)
    assert answer.headers["accept-ranges"] == "none"
