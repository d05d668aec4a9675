"""The Open Inference Protocol v2 over gRPC, with the event loop, engine, queues and metrics of HTTP.

Needs the extra `grpc`. The messages are those of `oip.proto`. See docs/decisions/0015.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError, Message

from service import grpc_health, protocol
from service import oip_pb2 as pb
from service.access import log_access
from service.context import begin_record, identify, request_id
from service.engine import Model
from service.errors import (
    BodyTimeout,
    CallerError,
    InferenceFailed,
    InvalidInput,
    MalformedBody,
    RepositoryRefused,
    RequestError,
    StartError,
    TimedOut,
    TooLarge,
    UnableToAnswer,
    Unauthorized,
    UnknownModel,
)
from service.grpc_limits import check_size
from service.handling import Service
from service.keys import KeyRing
from service.manifest import TensorSpec
from service.protocol import ServedGraph
from service.refusals import log_refusal
from service.repository import EXTENSION, Repository
from service.room import Room, Share
from service.tensors import Array, check_tensor, from_bytes, from_values, to_bytes

logger = logging.getLogger(__name__)

SERVICE = "inference.GRPCInferenceService"

_HEALTH = frozenset(
    {
        f"/{SERVICE}/ServerLive",
        f"/{SERVICE}/ServerReady",
        f"/{grpc_health.SERVICE}/Check",
        f"/{grpc_health.SERVICE}/Watch",
        f"/{grpc_health.SERVICE}/List",
    }
)

# The field of InferTensorContents that carries each datatype that a model may have.
_CONTENTS = {"UINT8": "uint_contents", "INT64": "int64_contents", "FP32": "fp32_contents"}

# The first that fits.
_CODES: tuple[tuple[type[RequestError], grpc.StatusCode], ...] = (
    (Unauthorized, grpc.StatusCode.UNAUTHENTICATED),
    (BodyTimeout, grpc.StatusCode.DEADLINE_EXCEEDED),
    (UnknownModel, grpc.StatusCode.NOT_FOUND),
    (RepositoryRefused, grpc.StatusCode.FAILED_PRECONDITION),
    (TooLarge, grpc.StatusCode.RESOURCE_EXHAUSTED),  # what gRPC itself says of a message over its limit
    (CallerError, grpc.StatusCode.INVALID_ARGUMENT),
    (TimedOut, grpc.StatusCode.DEADLINE_EXCEEDED),
    (InferenceFailed, grpc.StatusCode.INTERNAL),
    (UnableToAnswer, grpc.StatusCode.UNAVAILABLE),
)

# What makes the span of a call one of an error (OpenTelemetry's conventions for gRPC).
_OUR_FAULT = frozenset(
    {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE}
)

# Of one connection; gRPC's clients let others wait. Each has memory from its head on, and the library ends
# some of a thousand that wait for a handler.
_MOST_CALLS = 900

# An answer of so many bytes fits into any client's window, and is gone when it is written.
_SMALL_ANSWER = 64 * 1024

# The library tells of the end of a call's messages an instant before it cancels the call of who has left, or
# whose message was too large.
_LEAVING = 0.1  # seconds

# Checking typed contents of more bytes than this would hold up the event loop.
_SMALL_CONTENTS = 32 * 1024

Handler = Callable[[Any], Awaitable[Message]]


async def start_server(service: Service) -> "Server":
    """Serve on CAPSNET_GRPC_PORT of CAPSNET_HOST until `stop` is called.

    Raises:
        StartError: the address cannot be taken.
    """
    settings = service.settings
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", settings.max_body),
            ("grpc.max_send_message_length", -1),  # as long as the rows that were admitted make it
            ("grpc.so_reuseport", 0),  # a port that is taken is an error, not shared
            ("grpc.max_concurrent_streams", _MOST_CALLS),
            # Or calls that a client begins before it has heard of that limit are broken off.
            ("grpc.http.overload_protection", 0),
        ]
    )
    inference = _Inference(service)
    server.add_generic_rpc_handlers((inference.handlers(),))
    health = grpc_health.Health(inference.check_key)
    await health.serve(server, SERVICE)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    try:
        port = server.add_insecure_port(f"{host}:{settings.grpc_port}")
    except RuntimeError as error:
        raise StartError(
            f"CAPSNET_GRPC_PORT: {host}:{settings.grpc_port} cannot be taken: {error}"
        ) from error
    await server.start()
    following = asyncio.create_task(health.follow(inference.is_ready))
    logger.info("serving the Open Inference Protocol over gRPC on %s:%d", host, port)
    return Server(server, health, following)


class Server:
    """A gRPC server that serves."""

    def __init__(
        self, server: grpc.aio.Server, health: grpc_health.Health, following: asyncio.Task[None]
    ) -> None:
        self._server = server
        self._health = health
        self._following = following

    async def leave(self) -> None:
        """Say to whoever asks or watches that new calls belong elsewhere."""
        self._following.cancel()
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace: float) -> None:
        """Accept nothing more, and finish what is in flight within so many seconds."""
        self._health.end_watches()
        await self._server.stop(grace)


class _Inference:
    """The service's methods."""

    def __init__(self, service: Service) -> None:
        self._settings = service.settings
        self._engine = service.engine
        self._metrics = service.metrics
        self._tracing = service.tracing
        self._repository = service.repository
        self._body_room = service.body_room
        self._answer_room = Room(service.settings.max_bodies, "answers that are not taken yet")
        self._keys = KeyRing(service.settings.api_keys)

    def handlers(self) -> grpc.GenericRpcHandler:
        methods: dict[str, tuple[Handler, type[Message]]] = {
            "ServerLive": (self._server_live, pb.ServerLiveRequest),
            "ServerReady": (self._server_ready, pb.ServerReadyRequest),
            "ModelReady": (self._model_ready, pb.ModelReadyRequest),
            "ServerMetadata": (self._server_metadata, pb.ServerMetadataRequest),
            "ModelMetadata": (self._model_metadata, pb.ModelMetadataRequest),
            "ModelInfer": (self._model_infer, pb.ModelInferRequest),
        }
        if self._repository:
            repository_methods = _RepositoryMethods(self._repository)
            methods |= {
                "RepositoryIndex": (repository_methods.index, pb.RepositoryIndexRequest),
                "RepositoryModelLoad": (repository_methods.load, pb.RepositoryModelLoadRequest),
                "RepositoryModelUnload": (repository_methods.unload, pb.RepositoryModelUnloadRequest),
            }
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                # All are unary, which on the wire is a stream of one message each way. As such gRPC's library
                # hands it over here, where a message and an answer have their limits.
                name: grpc.stream_stream_rpc_method_handler(
                    self._observed(f"/{SERVICE}/{name}", handler, message)
                )
                for name, (handler, message) in methods.items()
            },
        )

    def _observed(
        self, route: str, handler: Handler, message: type[Message]
    ) -> Callable[[object, grpc.aio.ServicerContext], Awaitable[None]]:
        """Count and time a method that takes such a message, and end it with a status where it fails."""

        async def observed(_: object, context: grpc.aio.ServicerContext) -> None:
            started = time.perf_counter()
            identity = identify(_headers(context))
            request_id.set(identity)
            # Initial metadata would make of an error the answer, and end gRPC's own retries (gRFC A6).
            trailer = (("x-request-id", identity),)
            context.set_trailing_metadata(trailer)
            stages = begin_record()
            code = grpc.StatusCode.CANCELLED  # unless it ends otherwise, the caller left
            self._metrics.in_flight.inc()
            ending = ExitStack()
            share = ending.enter_context(
                Share(self._answer_room)
            )  # until `abort`, which waits for the client
            if self._tracing:
                metadata = dict(context.invocation_metadata() or ())
                ending.enter_context(self._tracing.rpc(route, metadata, identity))
                ending.callback(self._tracing.add_stages, stages)
            try:
                try:
                    self.check_key(route, context)
                    await self._answer(context, handler, message, share)
                    code = grpc.StatusCode.OK
                    return
                except Exception as error:
                    code, text, when_again = _explain(error)
                # What `abort` raises is kept, with this frame, until Python looks for cycles: the error,
                # whose own frames hold the request, may not be part of that.
                await context.abort(code, text, trailer + when_again)
                raise AssertionError("not reached: abort raises")
            finally:
                if self._tracing:
                    self._tracing.end_rpc(code.value[0], failed=code in _OUR_FAULT)
                ending.close()
                self._metrics.in_flight.dec()
                seconds = time.perf_counter() - started
                self._metrics.request_ended(route, code.name, seconds)
                if self._settings.access_log:
                    log_access(
                        client=_address(context.peer()),
                        method="gRPC",
                        path=route,
                        route=route,
                        grpc_status=code.name,
                        seconds=seconds,
                        stages=stages,
                    )

        return observed

    async def _answer(
        self, context: grpc.aio.ServicerContext, handler: Handler, message: type[Message], share: Share
    ) -> None:
        data = await self._receive(context)
        answer = _serialize(await self._in_time(handler(_parse(message, data, self._settings.max_images))))
        del data
        limit = self._settings.answer_timeout
        if len(answer) > _SMALL_ANSWER:
            share.resize(min(len(answer), self._answer_room.size))  # a larger one may be there alone
        # Not by `write`: what ends that early would not know that they are sent.
        await context.send_initial_metadata(())
        try:
            async with asyncio.timeout(limit):
                await context.write(answer)
        except TimeoutError as error:
            raise TimedOut(f"The answer was not taken within {limit:g} s.") from error

    async def _receive(self, context: grpc.aio.ServicerContext) -> bytes:
        """The call's message, which gRPC's library tells of when it is whole, and within CAPSNET_MAX_BODY.

        Raises:
            BodyTimeout: it did not come in time.
            MalformedBody: there is none.
        """
        limit = self._settings.body_timeout
        try:
            async with asyncio.timeout(limit):
                data = await context.read()
        except TimeoutError as error:
            raise BodyTimeout(
                "The message did not arrive in time.",
                received="a part of it, or nothing",
                expected=f"all of it within {limit:g} s",
            ) from error
        if data is grpc.aio.EOF:
            await asyncio.sleep(_LEAVING)
            raise MalformedBody("There is no message.", received="nothing", expected="one message")
        return bytes(data)

    def check_key(self, route: str, context: grpc.aio.ServicerContext) -> None:
        """Refuse callers without a valid key, where keys are required, as over HTTP."""
        if not self._keys or (route in _HEALTH and not self._settings.health_needs_key):
            return
        if not self._keys.admits(_headers(context)):
            raise Unauthorized(
                "This needs an API key.",
                received="no valid key",
                expected="metadata authorization: Bearer <key>, or x-api-key: <key>",
            )

    async def _in_time(self, answer: Awaitable[Message]) -> Message:
        limit = self._settings.request_timeout
        try:
            async with asyncio.timeout(limit):
                return await answer
        except TimeoutError as error:
            raise TimedOut(f"There was no answer within {limit:g} s.") from error

    async def _server_live(self, _: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def _server_ready(self, _: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self.is_ready())

    async def _model_ready(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        graph = protocol.find_graph(self._engine, request.name, request.version)
        return pb.ModelReadyResponse(ready=self.is_ready(graph.model))

    def is_ready(self, model: Model | None = None) -> bool:
        """Whether requests should be sent to this model, or to any."""
        try:
            self._engine.require_ready(model)
        except UnableToAnswer:
            return False
        return True

    async def _server_metadata(self, _: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(
            name=protocol.SERVER_NAME,
            version=protocol.SERVER_VERSION,
            extensions=[EXTENSION] if self._repository else [],
        )

    async def _model_metadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        graph = protocol.find_graph(self._engine, request.name, request.version)
        inputs, outputs = (
            [
                pb.ModelMetadataResponse.TensorMetadata(
                    name=spec.name, datatype=spec.datatype, shape=spec.shape
                )
                for spec in specs
            ]
            for specs in (graph.inputs, graph.outputs)
        )
        return pb.ModelMetadataResponse(
            name=graph.name,
            versions=graph.versions,
            platform=protocol.PLATFORM,
            inputs=inputs,
            outputs=outputs,
        )

    async def _model_infer(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        graph = protocol.find_graph(self._engine, request.model_name, request.model_version)
        with graph.model.in_use(), Share(self._body_room) as share:
            # gRPC has received it whole by now, each message within CAPSNET_MAX_BODY.
            share.resize(request.ByteSize())
            arguments = graph, request, self._settings.max_images
            if request.raw_input_contents or request.ByteSize() <= _SMALL_CONTENTS:
                inputs = _inputs(*arguments)
            else:
                inputs = await asyncio.to_thread(_inputs, *arguments)
            wanted = protocol.find_outputs(graph, [output.name for output in request.outputs])
            for output in request.outputs:
                protocol.check_parameters(output.name, output.parameters)
            results = await protocol.infer(graph, inputs)
        return pb.ModelInferResponse(
            model_name=graph.name,
            model_version=graph.version,
            id=request.id,
            outputs=[
                pb.ModelInferResponse.InferOutputTensor(
                    name=spec.name, datatype=spec.datatype, shape=results[spec.name].shape
                )
                for spec in wanted
            ],
            raw_output_contents=[to_bytes(results[spec.name]) for spec in wanted],
        )


class _RepositoryMethods:
    """The methods of the repository extension."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    async def index(self, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        _check_repository(request)
        entries = await self._repository.index(ready=request.ready)
        return pb.RepositoryIndexResponse(
            models=[pb.RepositoryIndexResponse.ModelIndex(**asdict(entry)) for entry in entries]
        )

    async def load(self, request: pb.RepositoryModelLoadRequest) -> pb.RepositoryModelLoadResponse:
        _check_repository(request)
        await self._repository.load(request.model_name, _parameters(request))
        return pb.RepositoryModelLoadResponse()

    async def unload(self, request: pb.RepositoryModelUnloadRequest) -> pb.RepositoryModelUnloadResponse:
        _check_repository(request)
        await self._repository.unload(request.model_name, _parameters(request))
        return pb.RepositoryModelUnloadResponse()


def _check_repository(request: Any) -> None:
    if request.repository_name:
        raise InvalidInput(
            "There is one repository, the models folder, and it has no name.",
            received=repr(request.repository_name[:100]),
            expected="no repository_name",
        )


def _parameters(request: Any) -> dict[str, object]:
    return {
        name: getattr(value, value.WhichOneof("parameter_choice") or "", None)
        for name, value in request.parameters.items()
    }


def _headers(context: grpc.aio.ServicerContext) -> Iterator[tuple[bytes, bytes]]:
    """A call's metadata, as HTTP's headers are given."""
    for name, value in context.invocation_metadata() or ():
        yield name.encode(), value.encode() if isinstance(value, str) else value


def _address(peer: str) -> str:
    """Of `ipv4:127.0.0.1:50000` or `ipv6:%5B::1%5D:50000`."""
    return unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")


def _parse(message: type[Message], data: bytes, max_rows: int) -> Message:
    """Here and not by gRPC's library, which would tell the caller of Python's classes and log a traceback."""
    try:
        check_size(message, data, max_rows)
        return message.FromString(data)
    except DecodeError as error:
        raise MalformedBody(
            "The message cannot be parsed.",
            received=f"{len(data)} bytes of another form",
            expected=f"{message.DESCRIPTOR.full_name} in protobuf's binary format",
        ) from error


def _serialize(message: Message) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def _inputs(graph: ServedGraph, request: pb.ModelInferRequest, max_rows: int) -> dict[str, Array]:
    """The input tensors by name, known to be what the graph takes."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidInput(
            "The raw contents do not match the inputs.",
            received=f"{len(raw)} raw_input_contents for {len(request.inputs)} inputs",
            expected="one for each input, or none at all",
        )
    specs = protocol.find_inputs(graph, [given.name for given in request.inputs])
    inputs = {}
    for position, (spec, given) in enumerate(zip(specs, request.inputs, strict=True)):
        protocol.check_parameters(given.name, given.parameters)
        shape = check_tensor(spec, given.datatype, given.shape, max_rows)
        if not raw:
            inputs[spec.name] = from_values(spec, shape, _typed_values(spec, shape, given.contents))
        elif not given.HasField("contents"):
            inputs[spec.name] = from_bytes(spec, shape, raw[position])
        else:
            raise InvalidInput(
                f"The tensor {given.name!r} is given twice.",
                received="contents and raw_input_contents",
                expected="one of them",
            )
    return inputs


def _typed_values(
    spec: TensorSpec, shape: tuple[int, ...], contents: pb.InferTensorContents
) -> Sequence[Any]:
    """As many values as the shape needs, from the field of the datatype, the only one that may be filled."""
    filled = {field.name: values for field, values in contents.ListFields()}
    field = _CONTENTS[spec.datatype]
    if list(filled) != [field]:
        raise InvalidInput(
            f"The values of the tensor {spec.name!r} are not in the field of its datatype alone.",
            received=" and ".join(filled) or "neither",
            expected=f"{field}, or raw_input_contents",
        )
    values: Sequence[Any] = filled[field]
    count = math.prod(shape)
    if len(values) != count:  # before any is looked at: they may be millions
        raise InvalidInput(
            f"The data of the tensor {spec.name!r} do not match its shape.",
            received=f"{len(values)} values",
            expected=f"{count} numbers",
        )
    return values


def _explain(error: Exception) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """Status, words and trailing metadata for an error."""
    if not isinstance(error, RequestError):
        logger.exception("a gRPC method failed", exc_info=error)
        return grpc.StatusCode.INTERNAL, "The service failed; its log says why.", ()
    code = next(code for kind, code in _CODES if isinstance(error, kind))
    text = protocol.error_text(error.detail, error.received, error.expected)
    if isinstance(error, UnableToAnswer):
        log_refusal(error)
        if error.retry_after is not None:
            # How a gRPC server says when to try again (gRFC A6); in milliseconds.
            return code, text, (("grpc-retry-pushback-ms", str(1000 * error.retry_after)),)
    return code, text, ()
