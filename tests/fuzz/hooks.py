"""What schemathesis has to know beyond the OpenAPI document, which is the same for every model.

The document is narrowed to one model before cases are made of it, so that a case that fits it must be
answered, and one that does not must be refused. Bodies that no JSON Schema can describe (images, arrays,
tensors behind a JSON object) come from here as well.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import schemathesis
from hypothesis import strategies as st
from schemathesis.transport.serialization import Binary

from service.images import FORMATS, data_url
from service.manifest import read_manifest
from service.oip import HEADER_LENGTH, OCTETS
from service.tensors import Array, to_bytes
from tests.support.encoded import encode, npy

MODEL_FOLDER = "CAPSNET_FUZZED_MODEL"
"""The variable that names the folder of the model that is served."""

manifest = read_manifest(Path(os.environ[MODEL_FOLDER]))
classes, dimensions = manifest.capsule_shape
height, width = manifest.image.shape[:2]


# Images of the model's own size, so that no way of preprocessing refuses them.
_noise = np.random.default_rng(0).integers(0, 256, (4, *manifest.image.shape), np.uint8)
bodies = {media: [encode(image, name) for image in _noise] for media, name in FORMATS.items()}
texts = [data_url(image) for image in bodies["image/png"]]


def _tensors(rows: int, *, binary: bool) -> tuple[dict[str, Any], bytes]:
    """A request to the decoder, and the bytes after it."""
    arrays: dict[str, Array] = {
        "digit_capsules": np.full((rows, classes, dimensions), 0.1, np.float32),
        "target": np.arange(rows, dtype=np.int64) % classes,
    }
    raw = b""
    inputs = []
    for spec in manifest.decoder.inputs:
        array = arrays[spec.name]
        tensor: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype, "shape": array.shape}
        if binary:
            raw += (data := to_bytes(array))
            tensor["parameters"] = {"binary_data_size": len(data)}
        else:
            tensor["data"] = array.ravel().tolist()
        inputs.append(tensor)
    return {"inputs": inputs}, raw


_with_bytes = {}  # the body to the length of its JSON object
for _rows in (1, 3):
    _document, _raw = _tensors(_rows, binary=True)
    _text = json.dumps(_document).encode()
    _with_bytes[_text + _raw] = len(_text)

for _media, _files in bodies.items():
    schemathesis.openapi.media_type(_media, st.sampled_from(_files))
schemathesis.openapi.media_type("application/x-npy", st.sampled_from([npy(_noise[:n]) for n in (1, 4)]))
schemathesis.openapi.media_type(OCTETS, st.sampled_from(list(_with_bytes)))


@schemathesis.hook
def before_load_schema(_: Any, raw_schema: dict[str, Any]) -> None:
    """Narrow the document to the model."""
    for path, operations in raw_schema["paths"].items():
        for operation in operations.values():
            for parameter in operation.get("parameters", []):
                _narrow_parameter(path, parameter)
    schemas = raw_schema["components"]["schemas"]
    schemas["PredictRequest"]["properties"]["images"]["items"] = {"enum": texts}
    for name in ("ReconstructRequest", "ReconstructChoice", "SweepRequest", "SweepChoice"):
        properties = schemas[name]["properties"]
        properties["class"]["enum"] = list(manifest.classes)
        if "image" in properties:
            properties["image"] = {"enum": texts}
            vectors = properties["capsules"]
            vectors |= {"minItems": classes, "maxItems": classes}
            vectors["items"] |= {"minItems": dimensions, "maxItems": dimensions}
        if "dimensions" in properties:
            properties["dimensions"]["items"]["maximum"] = dimensions - 1
    schemas["TweakRequest"]["properties"]["dimension"]["maximum"] = dimensions - 1
    _narrow_inference(schemas)


def _narrow_parameter(path: str, parameter: dict[str, Any]) -> None:
    graphs = [f"{manifest.name}-encoder", f"{manifest.name}-decoder"]
    names = {
        ("query", "model"): [manifest.name, f"{manifest.name}/{manifest.version}"],
        ("path", "name"): graphs[1:] if path.endswith("/infer") else graphs,
        ("path", "version"): [manifest.version],
    }
    if found := names.get((parameter["in"], parameter["name"])):
        parameter["schema"]["enum"] = found


def _narrow_inference(schemas: dict[str, Any]) -> None:
    """One row for the decoder: the number of values that a tensor's shape asks for is beyond JSON Schema."""
    document, _ = _tensors(1, binary=False)
    values = {
        "digit_capsules": {"type": "number", "minimum": -10, "maximum": 10},
        "target": {"enum": list(range(classes))},  # by JSON Schema, 1.0 is an integer; by the protocol not
    }
    tensors = []
    for tensor in document["inputs"]:
        count = len(tensor["data"])
        data = {"type": "array", "items": values[tensor["name"]], "minItems": count, "maxItems": count}
        fixed = {key: {"const": tensor[key]} for key in ("name", "datatype")}
        tensors.append(
            {
                "type": "object",
                "properties": {**fixed, "shape": {"const": list(tensor["shape"])}, "data": data},
                "required": ["name", "datatype", "shape", "data"],
                "additionalProperties": False,
            }
        )
    properties = schemas["InferRequest"]["properties"]
    properties["inputs"] = {"type": "array", "prefixItems": tensors, "items": False, "minItems": len(tensors)}
    properties["outputs"] |= {"maxItems": 1}
    schemas["RequestOutput"]["properties"]["name"] = {"const": manifest.decoder.outputs[0].name}


@schemathesis.hook
def map_case(_: Any, case: Any) -> Any:
    """Mend what schemathesis cannot know of a case that is to be accepted.

    The header that says where a JSON object ends has to fit the body. And one file from a media type's own
    strategy in place of an array of files would be sent without a file name.
    """
    if not (case.meta and case.meta.generation.mode.is_positive):
        return case
    if isinstance(case.body, dict) and isinstance(case.body.get("images"), bytes | Binary):
        case.body["images"] = [case.body["images"]]
    if case.headers:
        length = _with_bytes.get(case.body) if isinstance(case.body, bytes) else None
        case.headers.pop(HEADER_LENGTH, None)
        if length is not None:
            case.headers[HEADER_LENGTH] = str(length)
    return case
