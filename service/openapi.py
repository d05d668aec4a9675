"""The parts of the OpenAPI document that FastAPI cannot see: bodies, queries and errors of plain requests."""

from collections.abc import Collection
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.errors import (
    CallerError,
    InvalidInput,
    NotAcceptable,
    RequestError,
    UnableToAnswer,
    Unauthorized,
)
from service.oip_schemas import InferRequest, ProtocolError
from service.problems import PROBLEM_MEDIA_TYPE
from service.schemas import (
    PredictRequest,
    Problem,
    ReconstructChoice,
    ReconstructRequest,
    SweepChoice,
    SweepRequest,
)

Schema = dict[str, Any]

BINARY: Schema = {"type": "string", "format": "binary"}

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
    return {"type": "array", "items": BINARY, "minItems": 1}


def form(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """The schema of a multipart body."""
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
    }


def problems(*statuses: int) -> dict[int | str, Schema]:
    """Answers with a problem document, in FastAPI's form."""
    return {
        status: {
            "description": " or ".join(_titles().get(status, ["Problem"])),
            "content": {PROBLEM_MEDIA_TYPE: {"schema": reference(Problem)}},
        }
        for status in statuses
    }


def operation(
    query: type[BaseModel], bodies: dict[str, Schema], answers: dict[str, Schema]
) -> dict[str, Any]:
    """Keyword arguments of a route that reads its plain request.

    Args:
        query: the query parameters.
        bodies: a schema for each media type of the body.
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
    content = {media: {"schema": body} for media, body in bodies.items()}
    return {
        "openapi_extra": {
            "parameters": parameters,
            "requestBody": {"required": True, "content": content},
        },
        "responses": {
            200: {"content": {media: {"schema": answer} for media, answer in answers.items()}},
            **problems(*_titles()),
        },
    }


def protocol_errors(*statuses: int) -> dict[int | str, Schema]:
    """Answers with the Open Inference Protocol's error object, in FastAPI's form."""
    return {
        status: {
            "description": " or ".join(_titles()[status]),
            "content": {"application/json": {"schema": reference(ProtocolError)}},
        }
        for status in statuses
    }


def protocol_operation(
    bodies: dict[str, Schema], answers: dict[str, Schema], request_header: str
) -> dict[str, Any]:
    """Keyword arguments of the protocol's inference routes, which read their plain request.

    Args:
        bodies: a schema for each media type of the body.
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
            "requestBody": {
                "required": True,
                "content": {media: {"schema": body} for media, body in bodies.items()},
            },
        },
        "responses": {
            200: {"content": {media: {"schema": answer} for media, answer in answers.items()}},
            **protocol_errors(*statuses),
        },
    }


def install(app: FastAPI, *, open_paths: Collection[str] | None) -> None:
    """Serve a document that holds every schema it refers to.

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
            if open_paths is not None:
                _require_key(schema, open_paths)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign] # FastAPI's documented way to extend the document


def _require_key(schema: Schema, open_paths: Collection[str]) -> None:
    """State the two ways to give an API key, where one is needed, and the answer without it."""
    schema["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    refusal = {
        "description": Unauthorized.title,
        "headers": {"WWW-Authenticate": {"schema": {"type": "string"}}},
        "content": {PROBLEM_MEDIA_TYPE: {"schema": reference(Problem)}},
    }
    protocol_refusal = {**refusal, "content": {"application/json": {"schema": reference(ProtocolError)}}}
    for path, operations in schema["paths"].items():
        if path not in open_paths:
            for operation in operations.values():
                operation["security"] = [{"bearer": []}, {"header": []}]
                is_protocol = path == "/v2" or path.startswith("/v2/")
                operation["responses"]["401"] = protocol_refusal if is_protocol else refusal


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
