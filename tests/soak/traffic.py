"""What the clients of a soak send: honest requests whose answers are known, and hostile ones."""

import asyncio
import base64
import contextlib
import io
import json
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from service.manifest import Manifest, Precision, read_manifest
from tests.soak.wire import Answer, Connection, request
from tests.support.encoded import base64_text, decode, encode, npy

TOLERANCE = 1e-3  # of lengths and pixels: a batch's other rows change the order of sums
SHADE = 2  # of 255, by which a drawn pixel may differ for the same reason


@dataclass(frozen=True)
class Honest:
    name: str
    data: bytes
    expected: Answer
    """What the idle service answered."""

    def check(self, answer: Answer) -> None:
        """Raises AssertionError where the answer is another."""
        assert answer.status == self.expected.status, (answer.status, answer.body[:300])
        kind = self.expected.headers["content-type"]
        assert answer.headers["content-type"] == kind
        if kind == "application/json":
            _same(json.loads(answer.body), json.loads(self.expected.body), self.name)
        elif kind in ("application/x-npy", "application/octet-stream"):
            assert _close(_numbers(answer), _numbers(self.expected)), self.name
        elif kind == "image/png":
            _same_image(answer.body, self.expected.body, self.name)


Hostile = Callable[[int], Awaitable[int | None]]
"""Misbehaves on the given port; the status that came of it, None where nobody stayed to see."""


def noise(manifest: Manifest, count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(7).integers(0, 256, (count, *manifest.image.shape), np.uint8)


async def honest(port: int, folder: Path) -> list[Honest]:
    """Every kind of request, with its answer by an idle service; lengths are proved by the graph itself."""
    manifest = read_manifest(folder)
    images = noise(manifest, 32)
    one = encode(images[0])
    url = "data:image/png;base64," + base64_text(one)
    graph = f"/v2/models/{manifest.name}"
    tensor = {"name": "images", "datatype": "UINT8", "shape": images[:2].shape}
    wanted = [{"name": "capsule_lengths"}]
    spelled = json.dumps({"inputs": [{**tensor, "data": images[:2].ravel().tolist()}], "outputs": wanted})
    named = json.dumps(
        {
            "inputs": [{**tensor, "parameters": {"binary_data_size": images[:2].size}}],
            "outputs": [{**wanted[0], "parameters": {"binary_data": True}}],
        }
    )
    form, boundary = _form([encode(image) for image in images[:4]])
    predict = {"content_type": "image/png"}
    requests = {
        "one": request("POST", "/predict", one, **predict),
        "drawn": request("POST", "/predict?reconstruction=true&capsules=true", one, **predict),
        "form": request("POST", "/predict", form, content_type=f"multipart/form-data; boundary={boundary}"),
        "bulk": request(
            "POST", "/predict", npy(images), content_type="application/x-npy", accept="application/x-npy"
        ),
        "reconstruct": request(
            "POST",
            "/reconstruct",
            json.dumps({"image": url, "tweaks": [{"dimension": 3, "delta": 0.2}]}).encode(),
            content_type="application/json",
            accept="image/png",
        ),
        "sweep": request(
            "POST",
            "/reconstruct/sweep",
            json.dumps({"image": url, "dimensions": [0, 1], "deltas": [-0.1, 0, 0.1]}).encode(),
            content_type="application/json",
        ),
        "oip json": request(
            "POST", f"{graph}-encoder/infer", spelled.encode(), content_type="application/json"
        ),
        "oip binary": request(
            "POST",
            f"{graph}-encoder/infer",
            named.encode() + images[:2].tobytes(),
            inference_header_content_length=str(len(named)),
        ),
        "metrics": request("GET", "/metrics"),
        "ready": request("GET", "/readyz"),
    }
    with Connection(port) as connection:
        kinds = [Honest(name, data, await connection.exchange(data)) for name, data in requests.items()]
    for kind in kinds:
        assert kind.expected.status == 200, (kind.name, kind.expected)
    answers = {kind.name: kind.expected for kind in kinds}
    (served,) = json.loads(answers["ready"].body)["models"]
    _prove_lengths(folder, served["precision"], images, answers["bulk"])
    return kinds


def _prove_lengths(folder: Path, precision: Precision, images: NDArray[np.uint8], bulk: Answer) -> None:
    graph = read_manifest(folder).encoders("cpu")[precision]
    session = onnxruntime.InferenceSession(folder / graph.file, providers=["CPUExecutionProvider"])
    (lengths,) = session.run(["capsule_lengths"], {"images": images})
    assert _close(lengths, np.load(io.BytesIO(bulk.body)))


def hostile(image: bytes, body_timeout: float) -> list[Hostile]:
    """Every kind of misbehaviour, with an image that would be taken."""
    whole = request("POST", "/predict", image, content_type="image/png")
    head = len(whole) - len(image)
    return [
        _bad(b"no image", "image/png", 422),
        _bad(image[: len(image) // 2], "image/png", 422),
        _bad(b'{"images": [', "application/json", 400),
        _bad(b'{"images": [1]}', "application/json", 422),
        _bad(npy(np.zeros((1, 5, 5), np.uint8)), "application/x-npy", 422),
        _bad(b"--x\r\n\r\n", "multipart/form-data; boundary=x", 400, 422),
        _bad(b"x", "text/plain", 415),
        _bad(bytes(2 << 20), "image/png", 413),
        _gone_after(whole[: head + len(image) // 2]),
        _gone_after(whole),
        _slow(whole[:head], image, body_timeout),
        _no_http,
    ]


def _bad(body: bytes, kind: str, *expected: int) -> Hostile:
    async def bad_body(port: int) -> int:
        with Connection(port) as connection:
            answer = await connection.exchange(request("POST", "/predict", body, content_type=kind))
        assert answer.status in (*expected, 503), (kind, answer)
        return answer.status

    return bad_body


def _gone_after(sent: bytes) -> Hostile:
    async def gone(port: int) -> None:
        with Connection(port) as connection:
            await connection.send(sent)
            await asyncio.sleep(random.random() * 0.02)  # noqa: S311 # no secret
            connection.close(reset=True)

    return gone


def _slow(head: bytes, body: bytes, body_timeout: float) -> Hostile:
    async def slow(port: int) -> int:
        """A byte now and then, and never the last."""
        with Connection(port) as connection:
            await connection.send(head)
            answer = asyncio.create_task(connection.receive())
            for byte in body[:-1]:
                await asyncio.wait([answer], timeout=body_timeout / 8)
                if answer.done():
                    break
                with contextlib.suppress(ConnectionError):  # closed in between, after its answer
                    await connection.send(bytes([byte]))
            status = (await answer).status
        assert status in (408, 503), status
        return status

    return slow


async def _no_http(port: int) -> int:
    with Connection(port) as connection:
        answer = await connection.exchange(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
    assert answer.status == 400, answer
    return answer.status


def _form(files: Sequence[bytes]) -> tuple[bytes, str]:
    boundary = "soak"
    parts = [
        f'--{boundary}\r\ncontent-disposition: form-data; name="images"; filename="{n}.png"\r\n'
        "content-type: image/png\r\n\r\n".encode()
        + file
        for n, file in enumerate(files)
    ]
    return b"\r\n".join([*parts, f"--{boundary}--\r\n".encode()]), boundary


def _numbers(answer: Answer) -> NDArray[Any]:
    if answer.headers["content-type"] == "application/x-npy":
        loaded: NDArray[Any] = np.load(io.BytesIO(answer.body))
        return loaded
    raw = answer.body[int(answer.headers["inference-header-content-length"]) :]
    return np.frombuffer(raw, np.float32)


def _close(found: NDArray[Any], expected: NDArray[Any]) -> bool:
    return found.shape == expected.shape and bool(
        np.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    )


def _same(found: Any, expected: Any, where: str) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected:
            _same(found[name], expected[name], f"{where}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for one, other in zip(found, expected, strict=True):
            _same(one, other, where)
    elif isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE), (where, found, expected)
    elif isinstance(expected, str) and expected.startswith("data:"):
        _same_image(_content(found), _content(expected), where)
    else:
        assert found == expected, (where, found, expected)


def _content(url: str) -> bytes:
    return base64.b64decode(url.partition(",")[2])


def _same_image(found: bytes, expected: bytes, where: str) -> None:
    one, other = (decode(data).astype(np.int16) for data in (found, expected))
    assert one.shape == other.shape, where
    assert np.abs(one - other).max() <= SHADE, where
