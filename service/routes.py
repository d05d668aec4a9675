"""The HTTP contract: /predict, /reconstruct, /reconstruct/sweep, /models and health."""

import asyncio
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import orjson
from fastapi import Request, Response
from numpy.typing import NDArray

from service import openapi
from service.bodies import (
    JSON,
    MAX_MARKS,
    MULTIPART,
    NPY,
    NPZ,
    PNG,
    accepted,
    aside,
    file_parts,
    list_header,
    media_type,
    only_part,
    parse_json,
    parse_multipart,
    parse_query,
    read_body,
)
from service.decoding import naming
from service.engine import Float, Model, Predictions
from service.errors import InvalidInput
from service.figures import sweep_figure
from service.handling import Router, Service, answer_in_time, service_of
from service.images import FORMATS, Pixels, data_url, decode_base64, encode_png, read_npy, to_uint8
from service.room import Share
from service.schemas import (
    LiveAnswer,
    ModelQuery,
    ModelsAnswer,
    PredictAnswer,
    PredictQuery,
    PredictRequest,
    ReadyAnswer,
    ReadyModel,
    ReconstructAnswer,
    ReconstructChoice,
    ReconstructQuery,
    ReconstructRequest,
    ServedModel,
    SweepAnswer,
    SweepChoice,
    SweepRequest,
)
from service.settings import Settings
from service.tweaks import apply_tweaks, default_deltas

router = Router()


# The routes of the hot path take the plain request and return bytes: FastAPI's own validation and
# serialisation cost more than the rest of the handling together. `openapi` documents what they do.

PREDICT_BODIES = (*FORMATS, MULTIPART, JSON, NPY)
PREDICT_ANSWERS = (JSON, NPY, NPZ)

_IMAGE_TYPES = ", ".join(FORMATS)  # of a form's file part, as OpenAPI lists them


@router.post(
    "/predict",
    summary="Classify images",
    response_model=PredictAnswer,
    **openapi.operation(
        PredictQuery,
        bodies={
            **dict.fromkeys(FORMATS, openapi.body(openapi.BINARY)),
            MULTIPART: openapi.form({"images": openapi.files()}, encoding={"images": _IMAGE_TYPES}),
            JSON: openapi.body(openapi.reference(PredictRequest)),
            NPY: openapi.body(openapi.BINARY),
        },
        answers={NPY: openapi.BINARY, NPZ: openapi.BINARY},
    ),
)
async def predict(request: Request) -> Response:
    """One prediction for each image, in order.

    The body is one image; or a form with parts `images`; or JSON with base64 texts; or an npy array,
    uint8 (N, H, W) or (N, H, W, 3), that is taken as it is. `Accept: application/x-npy` answers with the
    capsule lengths, float32 (N, classes); `application/x-npz` with `digit_capsules`, `capsule_lengths`,
    `index`, `reconstruction_error` and `in_distribution`, and where asked for `reconstructions` and
    `images`.
    """
    service = service_of(request)
    query = parse_query(PredictQuery, request)
    answer = accepted(request, PREDICT_ANSWERS)
    kind = media_type(request, PREDICT_BODIES)
    with service.engine.choose(query.model).in_use() as model, Share(service.body_room) as share:
        body = await read_body(request, service.settings, share)
        model.require_room()

        async def work() -> Response:
            if kind == NPY:
                images = read_npy(body, model.manifest.image.shape, service.settings.max_images)
            else:
                encoded = [body]
                if kind in (JSON, MULTIPART):
                    encoded = await aside(len(body), _predict_images, request, kind, body, service.settings)
                images = await service.decoder.decode(encoded, model.manifest.image, query.preprocess)
            predictions = await model.predict(images)
            return await _encode(len(images), _predict_answer, answer, model, query, images, predictions)

        return _of(model, await answer_in_time(request, work()))


def _predict_images(request: Request, kind: str, body: bytes, settings: Settings) -> list[bytes]:
    if kind == JSON:
        # The object and its list have a bracket each, and an image may be a data URL with a comma of its own.
        marks = 2 * settings.max_images + 1
        return _decoded(parse_json(PredictRequest, body, max_marks=max(MAX_MARKS, marks)).images)
    parts = parse_multipart(request, body, ["images"], settings.max_images)
    return file_parts(parts, "images")


def _decoded(texts: list[str]) -> list[bytes]:
    images = []
    for position, text in enumerate(texts):
        with naming(position, len(texts)):
            images.append(decode_base64(text))
    return images


def _predict_answer(
    answer: str, model: Model, query: PredictQuery, images: Pixels, found: Predictions
) -> Response:
    if answer == NPY:
        return _npy(found.lengths)
    if answer == NPZ:
        arrays: dict[str, NDArray[Any]] = {
            "digit_capsules": found.capsules,
            "capsule_lengths": found.lengths,
            "index": found.index,
            "reconstruction_error": found.errors,
            "in_distribution": found.in_distribution,
        }
        if query.reconstruction:
            arrays["reconstructions"] = found.reconstructions
        if query.image:
            arrays["images"] = images
        return _npz(arrays)
    classes = model.manifest.classes
    lengths = found.lengths.tolist()
    predictions = []
    for row, index in enumerate(found.index.tolist()):
        ranking = sorted(range(len(classes)), key=lengths[row].__getitem__, reverse=True)[: query.top_k]
        prediction = {
            "label": classes[index],
            "index": index,
            "length": lengths[row][index],
            "lengths": lengths[row],
            "top": [{"label": classes[i], "index": i, "length": lengths[row][i]} for i in ranking],
            "reconstruction_error": found.errors[row],
            "in_distribution": found.in_distribution[row],
        }
        if query.capsules:
            prediction["capsules"] = found.capsules[row]
        if query.reconstruction:
            prediction["reconstruction"] = _drawing(found.reconstructions[row])
        if query.image:
            prediction["image"] = data_url(encode_png(images[row]))
        predictions.append(prediction)
    return _json({"model": _name(model), "predictions": predictions})


RECONSTRUCT_BODIES = (JSON, MULTIPART)
RECONSTRUCT_ANSWERS = (JSON, PNG)


@router.post(
    "/reconstruct",
    summary="Draw an image again from its capsule, changed as asked",
    response_model=ReconstructAnswer,
    **openapi.operation(
        ReconstructQuery,
        bodies={
            JSON: openapi.body(openapi.reference(ReconstructRequest)),
            MULTIPART: openapi.form(
                {"image": openapi.FILE},
                {"request": openapi.reference(ReconstructChoice)},
                encoding={"image": _IMAGE_TYPES, "request": JSON},
            ),
        },
        answers={PNG: openapi.BINARY},
    ),
)
async def reconstruct(request: Request) -> Response:
    """The reconstruction of an image, or from capsules that /predict returned, with tweaks done in order.

    `Accept: image/png` answers with the reconstruction itself.
    """
    service = service_of(request)
    query = parse_query(ReconstructQuery, request)
    answer = accepted(request, RECONSTRUCT_ANSWERS)
    kind = media_type(request, RECONSTRUCT_BODIES)
    with service.engine.choose(query.model).in_use() as model, Share(service.body_room) as share:
        body = await read_body(request, service.settings, share)

        async def work() -> Response:
            choice, given = await aside(
                len(body), _source, request, kind, body, ReconstructRequest, ReconstructChoice
            )
            tweaks = [tweak.tweak() for tweak in choice.tweaks]
            index = _class_index(model, choice.label)
            _check_count("tweaks", len(tweaks), service.settings.max_tweaks)
            _check_dimensions(model, [tweak.dimension for tweak in tweaks])
            capsules, index = await _capsules(service, model, query, given, index)
            capsules = apply_tweaks(capsules, index, tweaks)
            drawn = await model.reconstruct(capsules[np.newaxis], np.array([index]))
            if answer == PNG:
                return Response(encode_png(to_uint8(drawn[0])), media_type=PNG)
            document = {
                "model": _name(model),
                "label": model.manifest.classes[index],
                "index": index,
                "capsule": capsules[index],
                "reconstruction": _drawing(drawn[0]),
            }
            if query.pixels:
                document["pixels"] = drawn[0]
            return _json(document)

        return _of(model, await answer_in_time(request, work()))


SWEEP_ANSWERS = (JSON, NPZ, PNG)


@router.post(
    "/reconstruct/sweep",
    summary="Move each dimension of a capsule through its range",
    response_model=SweepAnswer,
    **openapi.operation(
        ModelQuery,
        bodies={
            JSON: openapi.body(openapi.reference(SweepRequest)),
            MULTIPART: openapi.form(
                {"image": openapi.FILE},
                {"request": openapi.reference(SweepChoice)},
                encoding={"image": _IMAGE_TYPES, "request": JSON},
            ),
        },
        answers={NPZ: openapi.BINARY, PNG: openapi.BINARY},
    ),
)
async def sweep(request: Request) -> Response:
    """The paper's figure 4: one row for each dimension, one reconstruction for each delta.

    `Accept: image/png` answers with the labelled grid; `application/x-npz` with `reconstructions`,
    float32 (dimensions, deltas, H, W[, 3]), `dimensions`, `deltas`, `capsule` and its class's `index`.
    """
    service = service_of(request)
    query = parse_query(ModelQuery, request)
    answer = accepted(request, SWEEP_ANSWERS)
    kind = media_type(request, RECONSTRUCT_BODIES)
    with service.engine.choose(query.model).in_use() as model, Share(service.body_room) as share:
        body = await read_body(request, service.settings, share)

        async def work() -> Response:
            choice, given = await aside(len(body), _source, request, kind, body, SweepRequest, SweepChoice)
            shape = model.manifest.capsules
            tweaks = [tweak.tweak() for tweak in choice.tweaks]
            dimensions = choice.dimensions or list(range(shape.digit_dimensions))
            deltas = choice.deltas or default_deltas(shape.tweak_range, shape.tweak_step)
            index = _class_index(model, choice.label)
            _check_count("tweaks", len(tweaks), service.settings.max_tweaks)
            _check_count("deltas", len(choice.deltas), service.settings.max_deltas)
            _check_dimensions(model, [*dimensions, *(tweak.dimension for tweak in tweaks)])
            capsules, index = await _capsules(service, model, query, given, index)
            capsules = apply_tweaks(capsules, index, tweaks)
            drawn = await model.sweep(capsules, index, dimensions, deltas)
            swept = _Sweep(index, capsules[index], dimensions, deltas, drawn)
            return await _encode(len(dimensions) * len(deltas), _sweep_answer, answer, model, swept)

        return _of(model, await answer_in_time(request, work()))


@dataclass(frozen=True)
class _Sweep:
    index: int
    capsule: Float  # the one that the sweep starts from
    dimensions: list[int]
    deltas: list[float]
    drawn: Float  # (dimensions, deltas, H, W[, 3])


def _sweep_answer(answer: str, model: Model, swept: _Sweep) -> Response:
    if answer == NPZ:
        return _npz(
            {
                "reconstructions": swept.drawn,
                "dimensions": np.array(swept.dimensions),
                "deltas": np.array(swept.deltas),
                "capsule": swept.capsule,
                "index": np.array(swept.index),
            }
        )
    label = model.manifest.classes[swept.index]
    every = model.manifest.dimension_names(label)
    names = [every[dimension] for dimension in swept.dimensions] if every else []
    if answer == PNG:
        title = f"class {label}: dimension by delta"
        figure = sweep_figure(swept.drawn, title, swept.dimensions, swept.deltas, names)
        return Response(encode_png(figure, large=True), media_type=PNG)
    return _json(
        {
            "model": _name(model),
            "label": label,
            "index": swept.index,
            "capsule": swept.capsule,
            "dimensions": swept.dimensions,
            "names": names,
            "deltas": swept.deltas,
            "reconstructions": [[_drawing(values) for values in row] for row in swept.drawn],
        }
    )


# What a reconstruction starts from -----------------------------------------------------------------


_Given = bytes | Float
"""An encoded image, or capsules (classes, dimensions)."""

Whole = TypeVar("Whole", ReconstructRequest, SweepRequest)
Choice = TypeVar("Choice", ReconstructChoice, SweepChoice)


def _source(
    request: Request, kind: str, body: bytes, whole: type[Whole], choice: type[Choice]
) -> tuple[Whole | Choice, _Given]:
    """What is asked for, and what of: from one JSON text, or from the parts `image` and `request`."""
    if kind == JSON:
        parsed = parse_json(whole, body)
        if parsed.image:
            return parsed, decode_base64(parsed.image)
        return parsed, _array(parsed.capsules)
    parts = parse_multipart(request, body, ["image", "request"], max_files=2)
    image = only_part(file_parts(parts, "image"), "image")
    texts = parts.get("request")
    if not texts:
        return choice(), image
    return parse_json(choice, only_part(texts, "request"), where="part request"), image


def _array(vectors: list[list[float]]) -> Float:
    widths = sorted({len(vector) for vector in vectors})
    if len(widths) > 1:
        raise InvalidInput(
            "The capsules differ in length.",
            received=f"vectors of {widths[0]} to {widths[-1]} components",
            expected="as many components in each vector",
        )
    return np.array(vectors, np.float32)


async def _capsules(
    service: Service, model: Model, query: ModelQuery, given: _Given, index: int | None
) -> tuple[Float, int]:
    """Capsules (classes, dimensions), and the class asked for or else the one with the longest capsule."""
    if not isinstance(given, bytes):
        if given.shape != model.manifest.capsule_shape:
            raise InvalidInput(
                "The capsules are not those of this model.",
                received=" x ".join(map(str, given.shape)),
                expected="{} classes x {} dimensions".format(*model.manifest.capsule_shape),
            )
        lengths = np.linalg.norm(given, axis=1)
        return given, int(lengths.argmax()) if index is None else index
    model.require_room()
    images = await service.decoder.decode([given], model.manifest.image, query.preprocess)
    found = await model.predict(images)
    return found.capsules[0], int(found.index[0]) if index is None else index


def _class_index(model: Model, label: str) -> int | None:
    if not label:
        return None
    classes = model.manifest.classes
    if label not in classes:
        raise InvalidInput(
            "This model has no such class.",
            received=repr(label[:100]),
            expected=f"one of {', '.join(classes)}",
        )
    return classes.index(label)


def _check_count(what: str, found: int, limit: int) -> None:
    if found > limit:
        raise InvalidInput(f"Too many {what}.", received=str(found), expected=f"at most {limit}")


def _check_dimensions(model: Model, dimensions: list[int]) -> None:
    count = model.manifest.capsules.digit_dimensions
    beyond = [dimension for dimension in dimensions if dimension >= count]
    if beyond:
        raise InvalidInput(
            "The capsules have no such dimension.", received=str(beyond[0]), expected=f"0 to {count - 1}"
        )


# Models and health ---------------------------------------------------------------------------------


@router.get("/models", summary="What is served")
async def models(request: Request) -> ModelsAnswer:
    """Every served version with its manifest, newest first."""
    engine = service_of(request).engine
    return ModelsAnswer(
        models=[
            ServedModel(
                name=model.manifest.name,
                version=model.manifest.version,
                default=model is engine.default,
                device=model.device,
                precision=model.precision,
                threads=model.threads,
                manifest=model.manifest,
            )
            for model in engine
        ]
    )


@router.get("/livez", summary="Whether the process answers at all")
async def live() -> LiveAnswer:
    """Restart the process when this fails."""
    return LiveAnswer(status="live")


@router.get("/readyz", summary="Whether requests should be sent here", responses=openapi.problems(503))
async def ready(request: Request) -> ReadyAnswer:
    """Ready once every model has been warmed up on its device, until the service begins to stop.

    Not ready either while a model's runs fail, three in a row, or one takes longer than a request may.
    """
    engine = service_of(request).engine
    engine.require_ready()
    return ReadyAnswer(
        status="ready",
        models=[
            ReadyModel(
                name=model.manifest.name,
                version=model.manifest.version,
                device=model.device,
                precision=model.precision,
            )
            for model in engine
        ],
    )


@router.get(
    "/metrics",
    summary="Figures for Prometheus",
    response_class=Response,
    responses={
        200: {
            "content": {
                media: {"schema": {"type": "string"}}
                for media in ("text/plain", "application/openmetrics-text")
            }
        }
    },
)
async def metrics(request: Request) -> Response:
    """Counts and durations since the start, in Prometheus' text form or, if accepted, OpenMetrics."""
    body, kind = await asyncio.to_thread(
        service_of(request).metrics.exposition, list_header(request, b"accept", "")
    )
    return Response(body, headers={"Content-Type": kind})


# Answers -------------------------------------------------------------------------------------------


async def _encode(count: int, encode: Callable[..., Response], *arguments: object) -> Response:
    """Build an answer, on a thread where it is large enough to hold up the event loop."""
    if count <= 8:
        return encode(*arguments)
    return await asyncio.to_thread(encode, *arguments)


def _of(model: Model, response: Response) -> Response:
    """The answer with the model's name in a header, since arrays and images have no place for it."""
    response.raw_headers.append((b"x-capsnet-model", model.manifest.reference.encode()))
    return response


def _name(model: Model) -> dict[str, str]:
    return {"name": model.manifest.name, "version": model.manifest.version}


def _drawing(values: Float) -> str:
    return data_url(encode_png(to_uint8(values)))


def _json(document: dict[str, Any]) -> Response:
    return Response(orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY), media_type=JSON)


def _npy(array: NDArray[Any]) -> Response:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return Response(file.getvalue(), media_type=NPY)


def _npz(arrays: dict[str, NDArray[Any]]) -> Response:
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return Response(file.getvalue(), media_type=NPZ)
