"""The Open Inference Protocol v2 over HTTP, with its extension for binary tensors.

Errors become the protocol's error object in `problems`, with all others. See docs/decisions/0014.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import Request, Response

from service import openapi, protocol
from service.bodies import JSON, aside, parse_json, read_body
from service.errors import InvalidInput, MalformedBody
from service.handling import Router, answer_in_time, service_of
from service.oip_schemas import (
    InferAnswer,
    InferRequest,
    ModelMetadata,
    ModelReady,
    RequestInput,
    ServerLive,
    ServerMetadata,
    ServerReady,
)
from service.protocol import ServedGraph
from service.repository import EXTENSION
from service.room import Share
from service.tensors import Array, check_tensor, from_bytes, from_values, to_bytes

router = Router(prefix="/v2", tags=["Open Inference Protocol"])

OCTETS = "application/octet-stream"
HEADER_LENGTH = "Inference-Header-Content-Length"

# Bounds what parsing can cost, as in `bodies`: 2 ** 18 numbers, and the brackets of such that are nested to
# triples, the colours of pixels. A tensor of so many values takes a quarter of a second as JSON and a
# millisecond as bytes.
_MAX_MARKS = 3 << 17

_SMALL_ANSWER = 4096  # values; writing more as JSON would hold up the event loop


# Server ----------------------------------------------------------------------------------------------


@router.get("/health/live", summary="Whether the server answers at all")
async def server_live() -> ServerLive:
    return ServerLive(live=True)


@router.get("/health/ready", summary="Whether all models are ready", responses=openapi.protocol_errors(503))
async def server_ready(request: Request) -> ServerReady:
    service_of(request).engine.require_ready()
    return ServerReady(ready=True)


@router.get("", summary="The server and its extensions of the protocol")
async def server_metadata(request: Request) -> ServerMetadata:
    extensions = ["binary_tensor_data"]
    if service_of(request).repository:
        extensions.append(EXTENSION)
    return ServerMetadata(name=protocol.SERVER_NAME, version=protocol.SERVER_VERSION, extensions=extensions)


# Models ----------------------------------------------------------------------------------------------
# Each graph of a model is a model of the protocol: <name>-encoder and <name>-decoder.

_MODEL = "/models/{name}"
_VERSION = "/models/{name}/versions/{version}"


@router.get(_VERSION, summary="The tensors of this version", responses=openapi.protocol_errors(404))
async def version_metadata(request: Request, name: str, version: str) -> ModelMetadata:
    return _metadata(request, name, version)


@router.get(_MODEL, summary="The tensors of the newest version", responses=openapi.protocol_errors(404))
async def model_metadata(request: Request, name: str) -> ModelMetadata:
    return _metadata(request, name, None)


def _metadata(request: Request, name: str, version: str | None) -> ModelMetadata:
    graph = protocol.find_graph(service_of(request).engine, name, version)
    return ModelMetadata(
        name=graph.name,
        versions=list(graph.versions),
        platform=protocol.PLATFORM,
        inputs=graph.inputs,
        outputs=graph.outputs,
    )


@router.get(
    f"{_VERSION}/ready",
    summary="Whether this version is ready",
    responses=openapi.protocol_errors(404, 503),
)
async def version_ready(request: Request, name: str, version: str) -> ModelReady:
    return _ready(request, name, version)


@router.get(
    f"{_MODEL}/ready", summary="Whether the model is ready", responses=openapi.protocol_errors(404, 503)
)
async def model_ready(request: Request, name: str) -> ModelReady:
    return _ready(request, name, None)


def _ready(request: Request, name: str, version: str | None) -> ModelReady:
    engine = service_of(request).engine
    graph = protocol.find_graph(engine, name, version)
    engine.require_ready(graph.model)
    return ModelReady(name=graph.name, ready=True)


# Inference -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """A request whose tensors are known to be what the graph takes."""

    id: str | None
    inputs: Mapping[str, Array]
    binary: Mapping[str, bool]
    """The wanted outputs in order, and whether each is to be sent as bytes."""


_INFER = openapi.protocol_operation(
    bodies={JSON: openapi.body(openapi.reference(InferRequest)), OCTETS: openapi.body(openapi.BINARY)},
    answers={OCTETS: openapi.BINARY},
    request_header=HEADER_LENGTH,
)


_RUN = """Run one graph on a batch.

Tensors are numbers in the JSON object, or bytes after it: then `Inference-Header-Content-Length` gives
the object's length, in the request and in the answer alike.
"""


@router.post(
    f"{_VERSION}/infer", summary="Run this version", description=_RUN, response_model=InferAnswer, **_INFER
)
async def version_infer(request: Request, name: str, version: str) -> Response:
    return await _infer(request, name, version)


@router.post(
    f"{_MODEL}/infer",
    summary="Run the newest version",
    description=_RUN,
    response_model=InferAnswer,
    **_INFER,
)
async def model_infer(request: Request, name: str) -> Response:
    return await _infer(request, name, None)


async def _infer(request: Request, name: str, version: str | None) -> Response:
    service = service_of(request)
    graph = protocol.find_graph(service.engine, name, version)
    with graph.model.in_use(), Share(service.body_room) as share:
        body = await read_body(request, service.settings, share)

        async def work() -> Response:
            text, raw = _split(body, request)
            asked = await aside(len(text), _parse, graph, text, raw, service.settings.max_images)
            outputs = await protocol.infer(graph, asked.inputs)
            values = sum(outputs[wanted].size for wanted, binary in asked.binary.items() if not binary)
            if values <= _SMALL_ANSWER:
                return _answer(graph, asked, outputs)
            return await asyncio.to_thread(_answer, graph, asked, outputs)

        return await answer_in_time(request, work())


def _split(body: bytes, request: Request) -> tuple[bytes, memoryview]:
    """The JSON object and the bytes after it."""
    given = request.headers.get(HEADER_LENGTH)
    if given is None:
        return body, memoryview(b"")
    length = int(given) if given.isascii() and given.isdecimal() and len(given) < 20 else -1
    if not 0 < length <= len(body):
        raise MalformedBody(
            f"The header {HEADER_LENGTH} does not fit the body.",
            received=repr(given[:30]),
            expected=f"the length of the JSON object, 1 to {len(body)} bytes",
        )
    return body[:length], memoryview(body)[length:]


def _parse(graph: ServedGraph, text: bytes, raw: memoryview, max_rows: int) -> _Asked:
    request = parse_json(InferRequest, text, max_marks=_MAX_MARKS)
    specs = protocol.find_inputs(graph, [given.name for given in request.inputs])
    inputs = {}
    for spec, given in zip(specs, request.inputs, strict=True):
        protocol.check_parameters(given.name, given.parameters.model_extra or {})
        shape = check_tensor(spec, given.datatype, given.shape, max_rows)
        if given.data is None:
            size = _binary_size(given, len(raw))
            inputs[spec.name] = from_bytes(spec, shape, raw[:size])
            raw = raw[size:]
        elif given.parameters.binary_data_size is None:
            inputs[spec.name] = from_values(spec, shape, given.data)
        else:
            raise InvalidInput(
                f"The tensor {given.name!r} is given twice.",
                received="data and binary_data_size",
                expected="one of them",
            )
    if raw:
        raise InvalidInput(
            "The body goes on after the last tensor.",
            received=f"{len(raw)} bytes that no input names",
            expected="as many bytes as the inputs' binary_data_size add up to",
        )
    wanted = protocol.find_outputs(graph, [output.name for output in request.outputs])
    binary = {spec.name: request.parameters.binary_data_output for spec in wanted}
    for output in request.outputs:
        protocol.check_parameters(output.name, output.parameters.model_extra or {})
        if output.parameters.binary_data is not None:
            binary[output.name] = output.parameters.binary_data
    return _Asked(request.id, inputs, binary)


def _binary_size(given: RequestInput, available: int) -> int:
    size = given.parameters.binary_data_size
    if size is None:
        raise InvalidInput(
            f"The tensor {given.name!r} has no values.",
            received="neither data nor binary_data_size",
            expected="one of them",
        )
    if size > available:
        raise InvalidInput(
            f"The body ends before the tensor {given.name!r} does.",
            received=f"{available} bytes after the JSON object, or after the tensor before",
            expected=f"binary_data_size, {size} bytes, and {HEADER_LENGTH} where the JSON object ends",
        )
    return size


def _answer(graph: ServedGraph, asked: _Asked, results: Mapping[str, Array]) -> Response:
    raw = []
    outputs = []
    datatypes = {spec.name: spec.datatype for spec in graph.outputs}
    for name, binary in asked.binary.items():
        array = results[name]
        output: dict[str, Any] = {"name": name, "datatype": datatypes[name], "shape": array.shape}
        if binary:
            raw.append(to_bytes(array))
            output["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            output["data"] = array.ravel()
        outputs.append(output)
    document: dict[str, Any] = {"model_name": graph.name, "model_version": graph.version}
    if asked.id is not None:
        document["id"] = asked.id
    text = orjson.dumps({**document, "outputs": outputs}, option=orjson.OPT_SERIALIZE_NUMPY)
    if not raw:
        return Response(text, media_type=JSON)
    return Response(b"".join([text, *raw]), headers={HEADER_LENGTH: str(len(text))}, media_type=OCTETS)
