"""The parts of the OpenAPI document that FastAPI cannot see: bodies, queries and errors of plain requests."""

from collections.abc import Collection, Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.errors import (
    CallerError,
    InvalidInput,
    NotAcceptable,
    RepositoryRefused,
    RequestError,
    UnableToAnswer,
    Unauthorized,
)
from service.oip_schemas import InferRequest, ProtocolError
from service.problems import PROBLEM_MEDIA_TYPE, speaks_protocol
from service.schemas import (
    PredictRequest,
    Problem,
    ReconstructChoice,
    ReconstructRequest,
    SweepChoice,
    SweepRequest,
)
from service.settings import Settings

Schema = dict[str, Any]

_COMPRESSED = (
    "May be compressed, with `Content-Encoding: gzip` or `deflate`; "
    "its length after decompression has the same limit."
)

BINARY: Schema = {"type": "string", "format": "binary"}

_NAMED = {"description": "Such a part needs a `filename`"}
FILE: Schema = {**BINARY, **_NAMED}
"""A form's part that is a file."""

# Headers that an answer has by its status; every answer has the first two.
ANSWER_HEADERS: dict[str, Schema] = {
    "X-Request-ID": {
        "description": "The request's own, or the one that it was given",
        "required": True,
        "schema": {"type": "string"},
    },
    "Server-Timing": {
        "description": "Milliseconds in each stage",
        "required": True,
        "schema": {"type": "string"},
    },
    "Retry-After": {
        "description": "Seconds after which trying again makes sense",
        "schema": {"type": "integer", "minimum": 1},
    },
    "WWW-Authenticate": {"required": True, "schema": {"type": "string"}},
    "X-Capsnet-Model": {
        "description": "The model that answered, `name/version`",
        "required": True,
        "schema": {"type": "string"},
    },
}
_EVERY_ANSWER = ("X-Request-ID", "Server-Timing")
_BY_STATUS = {"401": "WWW-Authenticate", "503": "Retry-After"}

# Models that only references name; FastAPI adds those of the answers itself.
_REFERENCED = (
    PredictRequest,
    ReconstructRequest,
    ReconstructChoice,
    SweepRequest,
    SweepChoice,
    Problem,
    InferRequest,
    ProtocolError,
)


def reference(model: type[BaseModel]) -> Schema:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def files() -> Schema:
    return {"type": "array", "items": BINARY, "minItems": 1, **_NAMED}


def form(
    required: dict[str, Schema], optional: dict[str, Schema] | None = None, *, encoding: dict[str, str]
) -> Schema:
    """A multipart body.

    Args:
        required, optional: the schema of each part.
        encoding: media types of parts that are files, or whose schema leaves that open.
    """
    return {
        "schema": {
            "type": "object",
            "properties": {**required, **(optional or {})},
            "required": list(required),
            "additionalProperties": False,
        },
        "encoding": {part: {"contentType": media} for part, media in encoding.items()},
    }


def body(schema: Schema) -> Schema:
    """A body that is no form."""
    return {"schema": schema}


def problems(*statuses: int) -> dict[int | str, Schema]:
    """Answers with a problem document, in FastAPI's form."""
    return {status: _problem(" or ".join(_titles()[status])) for status in statuses}


def _problem(description: str) -> Schema:
    return {"description": description, "content": {PROBLEM_MEDIA_TYPE: {"schema": reference(Problem)}}}


def operation(
    query: type[BaseModel], bodies: dict[str, Schema], answers: dict[str, Schema]
) -> dict[str, Any]:
    """Keyword arguments of a route that reads its plain request.

    Args:
        query: the query parameters.
        bodies: a `body` or `form` for each media type.
        answers: a schema for each media type of the answer beside JSON.
    """
    schema = query.model_json_schema()
    parameters = [
        {
            "name": name,
            "in": "query",
            "required": False,
            "description": parameter.pop("description"),
            "schema": {key: value for key, value in parameter.items() if key != "title"},
        }
        for name, parameter in schema["properties"].items()
    ]
    return {
        "openapi_extra": {
            "parameters": parameters,
            "requestBody": {"description": _COMPRESSED, "required": True, "content": bodies},
        },
        "responses": {
            200: {
                "content": {media: {"schema": answer} for media, answer in answers.items()},
                "headers": {"X-Capsnet-Model": {"$ref": "#/components/headers/X-Capsnet-Model"}},
            },
            **problems(*_titles()),
        },
    }


def protocol_errors(*statuses: int) -> dict[int | str, Schema]:
    """Answers with the Open Inference Protocol's error object, in FastAPI's form."""
    return {status: _protocol_error(" or ".join(_titles()[status])) for status in statuses}


def _protocol_error(description: str) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": reference(ProtocolError)}}}


def protocol_operation(
    bodies: dict[str, Schema], answers: dict[str, Schema], request_header: str
) -> dict[str, Any]:
    """Keyword arguments of the protocol's inference routes, which read their plain request.

    Args:
        bodies: a `body` for each media type.
        answers: a schema for each media type of the answer beside JSON.
        request_header: the header that tells the JSON object's length where bytes follow it.
    """
    statuses = [status for status in _titles() if status not in (NotAcceptable.status, InvalidInput.status)]
    return {
        "openapi_extra": {
            "parameters": [
                {
                    "name": request_header,
                    "in": "header",
                    "required": False,
                    "description": "Bytes of the JSON object, where the bytes of tensors follow it",
                    "schema": {"type": "integer", "minimum": 1},
                }
            ],
            "requestBody": {"description": _COMPRESSED, "required": True, "content": bodies},
        },
        "responses": {
            200: {
                "headers": {
                    request_header: {
                        "description": "As in a request, where bytes of tensors follow the JSON object",
                        "schema": {"type": "integer", "minimum": 1},
                    }
                },
                "content": {media: {"schema": answer} for media, answer in answers.items()},
            },
            **protocol_errors(*statuses),
        },
    }


def repository_operation(form: type[BaseModel]) -> dict[str, Any]:
    """Keyword arguments of a route of the protocol's repository extension, whose body may be absent."""
    responses = protocol_errors(400, 404, 408, 413, 415, 503)
    responses[400]["description"] += f" or {RepositoryRefused.title}"
    content = {"application/json": {"schema": form.model_json_schema()}}
    taken = {"description": _COMPRESSED, "required": False, "content": content}
    return {"openapi_extra": {"requestBody": taken}, "responses": responses}


def install(app: FastAPI, settings: Settings, *, open_paths: Collection[str] | None) -> None:
    """Serve a document that holds every schema it refers to.

    It says nothing of what is served: it is the same for everybody, with a key or without.

    Args:
        open_paths: paths that need no API key; None where nothing needs one.
    """

    def document() -> Schema:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            _, extra = models_json_schema(
                [(model, "validation") for model in _REFERENCED],
                ref_template="#/components/schemas/{model}",
            )
            schema.setdefault("components", {}).setdefault("schemas", {}).update(extra["$defs"])
            _forget_fastapis_validation(schema)
            _forget_unspoken_defaults(schema)
            _state_limits(schema, settings)
            if open_paths is not None:
                _require_key(schema, open_paths)
            _state_headers(schema)
            schema["servers"] = [{"url": "."}]  # beside the document, also below a proxy's prefix
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign] # FastAPI's documented way to extend the document


def _operations(schema: Schema) -> Iterator[tuple[str, Schema]]:
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            yield path, operation


def _forget_fastapis_validation(schema: Schema) -> None:
    """Drop the answer that FastAPI assumes wherever it parses a path: text is all that ours take."""
    for _, operation in _operations(schema):
        content = operation["responses"].get("422", {}).get("content", {})
        if "HTTPValidationError" in str(content):
            del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)


def _forget_unspoken_defaults(node: Any) -> None:
    """Drop defaults that stand for an absent value and could not be sent.

    They are empty texts, empty lists, and those of two values of which one alone may be sent.
    """
    if isinstance(node, dict):
        for alternative in node["oneOf"] if "properties" in node and "oneOf" in node else ():
            for name in alternative["required"]:
                node["properties"][name].pop("default", None)
        if node.get("default") in ("", []) and ("minLength" in node or "minItems" in node):
            del node["default"]
        for child in node.values():
            _forget_unspoken_defaults(child)
    elif isinstance(node, list):
        for child in node:
            _forget_unspoken_defaults(child)


def _state_limits(schema: Schema, settings: Settings) -> None:
    """State how many values a list may have by the settings."""
    parts = schema["paths"]["/predict"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    parts["properties"]["images"]["maxItems"] = settings.max_images
    for model in _REFERENCED:
        properties = schema["components"]["schemas"][model.__name__].get("properties", {})
        for name, limit in (
            ("images", settings.max_images),
            ("tweaks", settings.max_tweaks),
            ("deltas", settings.max_deltas),
        ):
            if name in properties:
                properties[name]["maxItems"] = limit


def _state_headers(schema: Schema) -> None:
    schema["components"]["headers"] = ANSWER_HEADERS
    for _, operation in _operations(schema):
        for status, response in operation["responses"].items():
            names = [*_EVERY_ANSWER, *filter(None, [_BY_STATUS.get(status)])]
            response.setdefault("headers", {}).update(
                {name: {"$ref": f"#/components/headers/{name}"} for name in names}
            )


def _require_key(schema: Schema, open_paths: Collection[str]) -> None:
    """State the two ways to give an API key, where one is needed, and the answer without it."""
    schema["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    for path, operation in _operations(schema):
        if path not in open_paths:
            operation["security"] = [{"bearer": []}, {"header": []}]
            refusal = _protocol_error if speaks_protocol(path) else _problem
            operation["responses"]["401"] = refusal(Unauthorized.title)


def _titles() -> dict[int, list[str]]:
    """Titles of every error that an admitted request can end in, by status."""
    titles: dict[int, list[str]] = {}
    pending: list[type[RequestError]] = [CallerError, UnableToAnswer]
    while pending:
        kind = pending.pop(0)
        pending.extend(kind.__subclasses__())
        if "status" in vars(kind):
            titles.setdefault(kind.status, []).append(kind.title)
    return dict(sorted(titles.items()))
