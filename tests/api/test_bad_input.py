"""Whatever is sent, the answer is a problem document in bounded time, and the next request is served."""

import base64
import json
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from service.bodies import inflate
from service.errors import MalformedBody, TooLarge
from tests.api.conftest import problem
from tests.support.encoded import base64_text, encode, gzipped, npy, npy_with_header, png_bomb
from tests.support.tiny_model import CLASSES, DIMENSIONS, image_of

PNG = encode(image_of(3))
ENCODED = base64_text(PNG)
NOISE = np.random.default_rng(0).integers(0, 256, (100, 100), np.uint8)
JSON = "application/json"
NPY = "application/x-npy"
CAPSULES = np.zeros((CLASSES, DIMENSIONS)).tolist()


@pytest.fixture(autouse=True)
def served_before_and_after(client: TestClient) -> Iterator[None]:
    """A bad request costs seconds of processor time at most, and a good one is served afterwards as ever."""
    started = time.process_time()
    yield
    assert time.process_time() - started < 5
    answer = client.post("/predict", content=PNG, headers={"content-type": "image/png"})
    assert answer.json()["predictions"][0]["label"] == "3"


def post(client: TestClient, path: str, body: bytes | str, kind: str) -> Any:
    return client.post(path, content=body, headers={"content-type": kind})


@pytest.mark.parametrize(
    ("kind", "body", "status", "says"),
    [
        pytest.param("image/png", b"this is no image", 422, "decoded", id="not an image"),
        pytest.param("image/png", encode(NOISE)[:5000], 422, "decoded", id="truncated PNG"),
        pytest.param("image/jpeg", encode(NOISE, "JPEG")[:3000], 422, "decoded", id="truncated JPEG"),
        pytest.param("image/png", png_bomb(20_000, 20_000), 413, "pixels", id="bomb"),
        pytest.param("image/png", png_bomb(0, 0), 422, "decoded", id="no pixels"),
        pytest.param("image/png", png_bomb(28, 0), 422, "decoded", id="no rows"),
        pytest.param("image/png", png_bomb(0, 28), 422, "decoded", id="no columns"),
        pytest.param("image/png", b"", 400, "empty", id="empty body"),
        pytest.param("image/png", bytes(17 * 1024 * 1024), 413, "too large", id="17 MB body"),
        pytest.param("text/plain", PNG, 415, "not taken", id="wrong content type"),
        pytest.param("", PNG, 415, "not taken", id="no content type"),
        pytest.param("image/tiff", PNG, 415, "not taken", id="an image type that is not taken"),
        pytest.param(JSON, b"", 400, "empty", id="empty JSON"),
        pytest.param(JSON, b"{", 400, "not JSON", id="broken JSON"),
        pytest.param(JSON, b"\xff\xfe", 400, "not JSON", id="JSON that is not UTF-8"),
        pytest.param(JSON, b"[" * 30_000, 400, "not JSON", id="deep JSON"),
        pytest.param(JSON, b"[]", 422, "body", id="JSON list"),
        pytest.param(JSON, b"null", 422, "body", id="JSON null"),
        pytest.param(JSON, b"{}", 422, "images", id="JSON without images"),
        pytest.param(JSON, b'{"images": []}', 422, "images", id="no images"),
        pytest.param(JSON, b'{"images": "x"}', 422, "images", id="images not a list"),
        pytest.param(JSON, b'{"images": [1]}', 422, "images.0", id="image not a text"),
        pytest.param(JSON, b'{"images": [""]}', 422, "images.0", id="empty image"),
        pytest.param(JSON, b'{"images": ["AAAA"], "x": 1}', 422, "x", id="unknown field"),
        pytest.param(JSON, b'{"images": ["%%%"]}', 422, "base64", id="broken base64"),
        pytest.param(JSON, b'{"images": ["AAAA"]}', 422, "decoded", id="base64 of no image"),
        pytest.param(
            JSON, b'{"images": [' + b"0," * 8_000_000 + b"0]}", 413, "values", id="millions of values"
        ),
        pytest.param(NPY, npy(np.zeros((1, 28, 28), np.float32)), 422, "batch of images", id="npy dtype"),
        pytest.param(NPY, npy(np.zeros((1, 9, 9), np.uint8)), 422, "batch of images", id="npy shape"),
        pytest.param(
            NPY, npy(np.array([print], object), allow_pickle=True), 422, "batch of images", id="npy pickle"
        ),
        pytest.param(NPY, b"\x80\x04\x95" + bytes(50), 422, "npy file", id="bare pickle"),
        pytest.param(NPY, npy_with_header("(" * 9000), 422, "npy file", id="npy header"),
        pytest.param(NPY, npy(np.zeros((2, 28, 28), np.uint8))[:-9], 422, "length", id="truncated npy"),
        pytest.param(NPY, npy(np.zeros((1025, 28, 28), np.uint8)), 413, "images", id="too many npy images"),
        pytest.param("multipart/form-data", PNG, 400, "multipart", id="multipart without a boundary"),
        pytest.param("multipart/form-data; boundary=x", b"nonsense", 400, "multipart", id="broken multipart"),
        pytest.param(
            "multipart/form-data; boundary=x", b"--x--\r\n", 422, "no part named 'images'", id="no parts"
        ),
    ],
)
def test_predict_refuses(client: TestClient, kind: str, body: bytes, status: int, says: str) -> None:
    """POST /predict answers each with what was received and what is expected."""
    document = problem(post(client, "/predict", body, kind), status)
    assert says in document["detail"]


def multipart(*parts: tuple[str, bytes]) -> bytes:
    """Parts of header and content between boundaries `x`."""
    body = b"".join(b"--x\r\n" + head.encode() + b"\r\n\r\n" + content + b"\r\n" for head, content in parts)
    return body + b"--x--\r\n"


FILE = 'Content-Disposition: form-data; name="{}"; filename="a.png"'
TEXT = 'Content-Disposition: form-data; name="{}"'


@pytest.mark.parametrize(
    ("path", "parts", "status", "says"),
    [
        ("/predict", [(FILE.format("photos"), PNG)], 422, "not taken here"),
        ("/predict", [(TEXT.format("images"), b"text")], 422, "not a file"),
        ("/predict", [(FILE.format("images"), PNG), (FILE.format("images"), b"no")], 422, "Image 1: "),
        ("/predict", [(FILE.format("images"), b"")], 422, "decoded"),
        ("/predict", [(FILE.format("images"), b"x")] * 1025, 413, "multipart"),
        ("/predict", [(TEXT.format("images"), b"x")] * 1025, 413, "multipart"),
        ("/predict", [("Content-Disposition: form-data", b"x")], 400, "multipart"),
        ("/predict", [("X-Nothing: at all", b"x")], 400, "multipart"),
        ("/reconstruct", [(TEXT.format("request"), b"{}")], 422, "no part named 'image'"),
        ("/reconstruct", [(FILE.format("image"), PNG)] * 2, 422, "several parts"),
        ("/reconstruct", [(FILE.format("image"), PNG), (TEXT.format("request"), b"{")], 400, "not JSON"),
        (
            "/reconstruct",
            [(FILE.format("image"), PNG), (TEXT.format("request"), b'{"image": "x"}')],
            422,
            "image",
        ),
        (
            "/reconstruct",
            [(FILE.format("image"), PNG)] + [(TEXT.format("request"), b"{}")] * 2,
            422,
            "several",
        ),
        ("/reconstruct/sweep", [(FILE.format("image"), PNG)] * 3, 413, "multipart"),
    ],
)
def test_forms_are_refused(
    client: TestClient, path: str, parts: list[tuple[str, bytes]], status: int, says: str
) -> None:
    """A form with other parts, too many, or broken ones is answered with which."""
    answer = post(client, path, multipart(*parts), "multipart/form-data; boundary=x")
    assert says in problem(answer, status)["detail"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        # A part counts once the boundary after it has come; the last one is `--x--`.
        ("/predict", multipart((FILE.format("images"), PNG))[: -len("--x--\r\n")]),
        ("/predict", multipart((FILE.format("images"), PNG), (FILE.format("images"), PNG))[:-200]),
        (
            "/reconstruct",
            multipart((FILE.format("image"), PNG), (TEXT.format("request"), b'{"class": "9"}'))[
                : -len("--\r\n")
            ],
        ),
    ],
    ids=["no last boundary", "broken off within a file", "a boundary that is not the last"],
)
def test_a_form_that_breaks_off_is_refused(client: TestClient, path: str, body: bytes) -> None:
    """No part is left out in silence: without its closing boundary the form is not whole."""
    document = problem(post(client, path, body, "multipart/form-data; boundary=x"), 400)
    assert "closing boundary" in document["received"]


@pytest.mark.parametrize("charset", ["undefined", "punycode", "idna", "utf-16", '"a;b"', "nonsense"])
def test_a_forms_charset_is_left_alone(client: TestClient, charset: str) -> None:
    """The media type has no charset: with any, names and texts are read as they are without one."""
    choice = (TEXT.format("request"), b'{"class": "3"}')
    for path, parts in (
        ("/predict", [(FILE.format("images"), PNG)]),
        ("/reconstruct", [(FILE.format("image"), PNG), choice]),
        ("/reconstruct/sweep", [(FILE.format("image"), PNG), choice]),
    ):
        answer = post(client, path, multipart(*parts), f"multipart/form-data; Charset={charset}; boundary=x")
        assert answer.status_code == 200, answer.text


def test_no_charset_makes_a_form_slow(client: TestClient) -> None:
    """Python takes a time that grows with the square of the length to decode this as the header says."""
    form = multipart((TEXT.format("request"), b"a-" + b"b" * 200_000))
    answer = post(client, "/reconstruct", form, "multipart/form-data; charset=punycode; boundary=x")
    assert "no part named 'image'" in problem(answer, 422)["detail"]


@pytest.mark.parametrize(
    "body",
    [
        multipart(*[(FILE.format("images") + "; a" * 1000, b"x")] * 1000),
        multipart(*[(f"{FILE.format('images')}\r\nX: {'a' * 2000}", b"x")] * 1000),
        multipart(*[(f"X:{' ' * 4000}\r\n{FILE.format('images')}", b"")] * 1000),
        multipart((FILE.format("images"), b"\r\n--xy" * 1_000_000)),
    ],
    ids=["parameters", "headers", "spaces", "boundaries"],
)
def test_what_a_form_holds_beside_its_files_is_bounded(client: TestClient, body: bytes) -> None:
    """All headers of parts together are bounded, their spaces too, and all that begins like a boundary."""
    headers = {"content-type": "multipart/form-data; boundary=x", "content-encoding": "gzip"}
    answer = client.post("/predict", content=gzipped(body), headers=headers)
    assert "Too many" in problem(answer, 413)["received"]


def test_a_form_may_have_as_many_files_with_long_names_as_the_limit_says(client: TestClient) -> None:
    """No honest form reaches the bounds: neither do 1,024 files with the longest names, nor does one."""
    name = "%E5%AD%97" * 85  # 255 bytes
    head = f"{FILE.format('images').replace('a.png', name)}\r\nContent-Type: image/png"
    answer = post(client, "/predict", multipart(*[(head, PNG)] * 1024), "multipart/form-data; boundary=x")
    assert answer.status_code == 200
    form = multipart((FILE.format("image").replace("a.png", name), PNG), (TEXT.format("request"), b"{}"))
    answer = post(client, "/reconstruct", form, "multipart/form-data; boundary=x")
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "detail", "received", "expected"),
    [
        ("/predict", {"image": "x"}, "body image: there is no such field", '"x"', "images"),
        ("/predict", {}, "body images: it is missing", "nothing", "images"),
        ("/predict?top_k=1000000000000000000", {}, "query top_k", "1000000000000000000", "equal to 1000"),
        ("/predict", [], "body: Input should be an object", "[]", "object"),
        ("/predict?capsule=true", {}, "query capsule: there is no such field", '"true"', "top_k"),
        ("/predict?capsules=yes", {}, "query capsules", '"yes"', "true or false"),
        ("/reconstruct", {}, "body: give either an image or capsules", "{}", "image"),
        ("/reconstruct", {"image": ENCODED, "class": None}, "body class", "null", "string"),
        ("/reconstruct", {"image": ENCODED, "klass": {"a": 1}}, "body klass", '{"a": 1}', "class"),
        ("/predict", {"images": [ENCODED, "%"]}, "Image 1: ", "'%'", "base64"),
    ],
)
def test_an_error_names_the_place_and_what_belongs_there(
    client: TestClient, path: str, body: object, detail: str, received: str, expected: str
) -> None:
    """What was received is told as JSON, and of a wrong name the right ones are."""
    document = problem(post(client, path, json.dumps(body), JSON), 422)
    assert document["detail"].startswith(detail)
    assert received in document["received"]
    assert expected in document["expected"]


@pytest.mark.parametrize("body", [{"x" * 10_000: 0}, {"images": "x" * 10_000}], ids=["name", "value"])
def test_an_error_repeats_little_of_what_was_sent(client: TestClient, body: object) -> None:
    """However long a name or a value is, the answer and the log tell its beginning."""
    answer = post(client, "/predict", json.dumps(body), JSON)
    assert "xxx" in str(problem(answer, 422))
    assert len(answer.content) < 1000


def test_an_error_in_a_forms_text_names_the_part(client: TestClient) -> None:
    """The text of the part `request` is not the body."""
    for text, status in ((b"{", 400), (b'{"klass": "3"}', 422)):
        form = multipart((FILE.format("image"), PNG), (TEXT.format("request"), text))
        answer = post(client, "/reconstruct", form, "multipart/form-data; boundary=x")
        assert "part request" in problem(answer, status)["detail"]


@pytest.mark.parametrize("path", ["/predict", "/reconstruct", "/reconstruct/sweep"])
@pytest.mark.parametrize("deep", ["[" * 90 + "]" * 90, '{"":' * 90 + "0" + "}" * 90], ids=["[", "{"])
def test_deep_json_is_refused_by_its_brackets(client: TestClient, path: str, deep: str) -> None:
    """Few commas hold many values where lists or objects lie in each other, as in a field that is unknown."""
    body = gzipped(f'{{"x": [{",".join([deep] * 1000)}]}}'.encode())
    answer = client.post(path, content=body, headers={"content-type": JSON, "content-encoding": "gzip"})
    assert "too many values" in problem(answer, 413)["detail"]
    form = multipart((FILE.format("image"), PNG), (TEXT.format("request"), deep.encode() * 1000))
    if path != "/predict":
        answer = post(client, path, form, "multipart/form-data; boundary=x")
        assert "too many values" in problem(answer, 413)["detail"]


def text_of(body: dict[str, Any]) -> str:
    return json.dumps(body)  # which writes NaN and Infinity as JavaScript would


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "either an image or capsules"),
        ({"image": ENCODED, "capsules": CAPSULES}, "either an image or capsules"),
        ({"image": ""}, "image"),
        ({"image": None}, "image"),
        ({"image": "%"}, "base64"),
        ({"image": base64.b64encode(b"no image").decode()}, "decoded"),
        ({"image": ENCODED, "class": "ten"}, "no such class"),
        ({"image": ENCODED, "class": ""}, "class"),
        ({"image": ENCODED, "class": 3}, "class"),
        ({"image": ENCODED, "klass": "3"}, "klass"),
        ({"image": ENCODED, "label": "3"}, "label"),
        ({"image": ENCODED, "tweaks": [{"dimension": 16, "delta": 0.1}]}, "no such dimension"),
        ({"image": ENCODED, "tweaks": [{"dimension": -1, "delta": 0.1}]}, "tweaks.0.dimension"),
        ({"image": ENCODED, "tweaks": [{"dimension": 1.5, "delta": 0.1}]}, "tweaks.0.dimension"),
        ({"image": ENCODED, "tweaks": [{"dimension": "1", "delta": 0.1}]}, "tweaks.0.dimension"),
        ({"image": ENCODED, "tweaks": [{"dimension": True, "delta": 0.1}]}, "tweaks.0.dimension"),
        ({"image": ENCODED, "tweaks": [{"dimension": 10**30, "delta": 0.1}]}, "dimension"),
        ({"image": ENCODED, "tweaks": [{"dimension": 1, "delta": float("nan")}]}, "tweaks.0.delta"),
        ({"image": ENCODED, "tweaks": [{"dimension": 1, "delta": float("inf")}]}, "tweaks.0.delta"),
        ({"image": ENCODED, "tweaks": [{"dimension": 1, "value": float("-inf")}]}, "tweaks.0.value"),
        ({"image": ENCODED, "tweaks": [{"dimension": 1, "delta": 10.5}]}, "tweaks.0.delta"),
        ({"image": ENCODED, "tweaks": [{"dimension": 1}]}, "either a delta or a value"),
        (
            {"image": ENCODED, "tweaks": [{"dimension": 1, "delta": 0, "value": 0}]},
            "either a delta or a value",
        ),
        ({"image": ENCODED, "tweaks": [{"dimension": 1, "delta": 0, "x": 0}]}, "tweaks.0.x"),
        ({"image": ENCODED, "tweaks": [{"dimension": 1, "delta": 0}] * 65}, "Too many tweaks"),
        ({"capsules": []}, "capsules"),
        ({"capsules": [[]]}, "not those of this model"),
        ({"capsules": CAPSULES[:9]}, "not those of this model"),
        ({"capsules": [vector[:15] for vector in CAPSULES]}, "not those of this model"),
        ({"capsules": [CAPSULES[0][:3], *CAPSULES[1:]]}, "differ in length"),
        ({"capsules": [[float("nan")] * 16, *CAPSULES[1:]]}, "capsules.0.0"),
        ({"capsules": [[1e300] * 16, *CAPSULES[1:]]}, "capsules.0.0"),
        ({"capsules": [["0"] * 16, *CAPSULES[1:]]}, "capsules.0.0"),
    ],
)
@pytest.mark.parametrize("path", ["/reconstruct", "/reconstruct/sweep"])
def test_reconstructions_are_refused(client: TestClient, path: str, body: dict[str, Any], says: str) -> None:
    """Both reconstruction routes answer each with the place, what was received and what is expected."""
    assert says in problem(post(client, path, text_of(body), JSON), 422)["detail"]


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
def test_numbers_beyond_finite_are_refused_however_written(client: TestClient, number: str) -> None:
    """A delta that overflows, or that JSON does not know, is a 4xx."""
    body = f'{{"image": "{ENCODED}", "tweaks": [{{"dimension": 0, "delta": {number}}}]}}'
    answer = post(client, "/reconstruct", body, JSON)
    assert answer.status_code in (400, 422)
    problem(answer, answer.status_code)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"dimensions": [0, 16]}, "no such dimension"),
        ({"dimensions": [3, 3]}, "swept once"),
        ({"dimensions": []}, "dimensions"),
        ({"deltas": []}, "deltas"),
        ({"deltas": [float("nan")]}, "deltas.0"),
        ({"deltas": [0.0] * 65}, "Too many deltas"),
        ({"deltas": [0.0] * 20_000}, "Too many deltas"),
    ],
)
def test_sweeps_are_refused(client: TestClient, more: dict[str, Any], says: str) -> None:
    """Dimensions and deltas of a sweep have their bounds."""
    answer = post(client, "/reconstruct/sweep", text_of({"image": ENCODED, **more}), JSON)
    assert says in problem(answer, 422)["detail"]


@pytest.mark.parametrize(
    ("query", "status", "says"),
    [
        ("capsules=yes", 422, "capsules"),
        ("capsules=1", 422, "capsules"),
        ("capsules=", 422, "capsules"),
        ("capsule=true", 422, "capsule"),
        ("capsules=true&capsules=false", 422, "given twice"),
        ("top_k=0", 422, "top_k"),
        ("top_k=1001", 422, "top_k"),
        ("top_k=2.5", 422, "top_k"),
        ("top_k=many", 422, "top_k"),
        ("top_k=٣", 422, "top_k"),
        ("preprocess=magic", 422, "preprocess"),
        ("model=", 422, "model"),
        ("model=none", 404, "not served"),
        ("model=tiny/9", 404, "not served"),
        ("model=../../etc/passwd", 404, "not served"),
        ("model=colour&preprocess=centre", 422, "not centred"),
    ],
)
def test_queries_are_refused(client: TestClient, query: str, status: int, says: str) -> None:
    """An unknown parameter, a repeated one, or a value out of range is named."""
    assert says in problem(post(client, f"/predict?{query}", PNG, "image/png"), status)["detail"]


@pytest.mark.parametrize("path", ["/predict", "/reconstruct", "/reconstruct/sweep"])
def test_a_query_of_many_parameters_is_refused_at_once(client: TestClient, path: str) -> None:
    """However often a name is repeated, it is not compared with each of the others."""
    answer = post(client, f"{path}?{'&'.join(['a'] * 16_000)}", PNG, "image/png")
    assert "too many query parameters" in problem(answer, 422)["detail"]


def test_preprocess_none_needs_the_models_size(client: TestClient) -> None:
    """Another size is answered with both sizes."""
    answer = post(client, "/predict?preprocess=none", encode(NOISE), "image/png")
    document = problem(answer, 422)
    assert document["received"] == "100x100 pixels"
    assert document["expected"].startswith("28x28 pixels")


@pytest.mark.parametrize("path", ["/predict", "/reconstruct", "/reconstruct/sweep"])
@pytest.mark.parametrize(
    ("encoding", "body", "status", "says"),
    [
        ("gzip", gzipped(bytes(17 * 1024 * 1024)), 413, "too large"),
        ("gzip", gzipped(PNG)[:-9], 400, "decompressed"),
        ("gzip", gzipped(PNG) + b"x", 400, "decompressed"),
        ("gzip", gzipped(PNG) + gzipped(PNG)[:-9], 400, "decompressed"),
        ("gzip", gzipped(b"") * 5000, 413, "too many gzip members"),
        ("deflate", b"no zlib stream", 400, "decompressed"),
        ("deflate", 2 * zlib.compress(b"{}"), 400, "decompressed"),
        ("gzip", gzipped(b""), 400, "empty"),
        ("br", b"x", 415, "compression"),
        ("x-compress", b"x", 415, "compression"),
        ("gzip, gzip", gzipped(gzipped(PNG)), 415, "compression"),
    ],
)
def test_bad_compressed_bodies(
    client: TestClient, path: str, encoding: str, body: bytes, status: int, says: str
) -> None:
    """Compressed bodies are bounded after decompression, whole, and compressed as is taken here."""
    headers = {"content-type": JSON, "content-encoding": encoding}
    assert says in problem(client.post(path, content=body, headers=headers), status)["detail"]


def test_a_body_is_not_decompressed_beyond_the_limit() -> None:
    """Of what would come out of a bomb no more is held than there may be."""
    bomb = gzipped(bytes(20_000_000))
    tracemalloc.start()
    with pytest.raises(TooLarge):
        inflate(bomb, "gzip", 1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize("size", [1, 60_000, 1_000_000])
def test_a_gzip_body_may_be_several_members_in_series(size: int) -> None:
    """What they hold is put together (RFC 1952, 2.2), and has one limit."""
    content = np.random.default_rng(1).integers(0, 256, 3_000_000, np.uint8).tobytes()[: 3 * size]
    body = b"".join(gzipped(content[start : start + size]) for start in range(0, len(content), size))
    assert inflate(body, "gzip", len(content)) == content
    with pytest.raises(TooLarge):
        inflate(body, "gzip", len(content) - 1)


def test_zeros_behind_gzip_fill_up() -> None:
    """They are left out, as gzip itself leaves them out; other bytes, or zeros after zlib, are refused."""
    assert inflate(gzipped(PNG) + bytes(512), "gzip", 1000) == PNG
    for body, encoding in ((gzipped(PNG) + b"\0x", "gzip"), (zlib.compress(PNG) + b"\0", "deflate")):
        with pytest.raises(MalformedBody):
            inflate(body, encoding, 1000)


def test_a_media_type_may_be_written_in_any_case(client: TestClient) -> None:
    """Content-Type names are the same in capitals (RFC 9110, 8.3.1)."""
    assert client.post("/predict", content=PNG, headers={"content-type": "Image/PNG"}).status_code == 200


@pytest.mark.parametrize(
    ("path", "accept"),
    [
        ("/predict", "text/html"),
        ("/predict", "image/png"),
        ("/predict", "image/*"),
        ("/predict", "application/json;q=0"),
        ("/predict", "application/json;q=high"),
        ("/reconstruct", "application/x-npz"),
        ("/reconstruct/sweep", ""),
    ],
)
def test_an_answer_in_another_form_is_refused(client: TestClient, path: str, accept: str) -> None:
    """When no offered form is accepted, the answer says which there are."""
    answer = client.post(path, content=PNG, headers={"content-type": "image/png", "accept": accept})
    assert "application/json" in problem(answer, 406)["expected"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("POST", "/predict/", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/predict", 405),
        ("DELETE", "/reconstruct", 405),
        ("POST", "/livez", 405),
    ],
)
def test_paths_and_methods(client: TestClient, method: str, path: str, status: int) -> None:
    """An unknown path is 404, another method 405 with those that there are."""
    answer = client.request(method, path, follow_redirects=False)
    problem(answer, status)
    assert ("allow" in answer.headers) == (status == 405)
