"""What the Open Inference Protocol sees of the engine: graphs as models, their metadata, inference.

Plain Python over numpy arrays, shared by HTTP and gRPC. See docs/decisions/0014 for the names.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

import numpy as np

from service.engine import Engine, Model
from service.errors import InvalidInput, UnknownModel
from service.manifest import Graph, TensorSpec
from service.tensors import Array
from service.tweaks import MAX_COMPONENT

SERVER_NAME = "capsnet"
SERVER_VERSION = version("capsnet")
PLATFORM = "onnx_onnxv1"  # the protocol's name for an ONNX graph

Role = Literal["encoder", "decoder"]
ROLES: tuple[Role, ...] = ("encoder", "decoder")


@dataclass(frozen=True)
class ServedGraph:
    """One graph of one version of a model, which to the protocol is a model of its own."""

    model: Model
    role: Role
    versions: tuple[str, ...]
    """Every served version of it, newest first."""

    @property
    def name(self) -> str:
        return f"{self.model.manifest.name}-{self.role}"

    @property
    def version(self) -> str:
        return self.model.manifest.version

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._graph.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._graph.outputs

    @property
    def _graph(self) -> Graph:
        manifest = self.model.manifest
        return manifest.encoder if self.role == "encoder" else manifest.decoder


def find_graph(engine: Engine, name: str, version: str | None = None) -> ServedGraph:
    """The graph that a protocol name and version stand for; without a version the newest.

    Raises:
        UnknownModel: no such name or version.
    """
    base, _, suffix = name.rpartition("-")
    served = [model for model in engine if model.manifest.name == base]  # newest first
    for role in ROLES:
        for model in served if role == suffix else ():
            if version in (None, "", model.manifest.version):
                return ServedGraph(model, role, tuple(other.manifest.version for other in served))
    names = sorted({f"{model.manifest.name}-{role}" for model in engine for role in ROLES})
    if name in names:
        raise UnknownModel(
            "This version of the model is not served.",
            received=repr((version or "")[:20]),
            expected=f"one of {', '.join(model.manifest.version for model in served)}",
        )
    raise UnknownModel(
        "This model is not served.", received=repr(name[:100]), expected=f"one of {', '.join(names)}"
    )


def find_inputs(graph: ServedGraph, names: Sequence[str]) -> list[TensorSpec]:
    """What the metadata says of each named input.

    Raises:
        InvalidInput: a name that is unknown, given twice, or missing.
    """
    specs = _find(graph.inputs, names, "input")
    missing = {spec.name for spec in graph.inputs} - set(names)
    if missing:
        raise InvalidInput(
            f"{graph.name} needs more inputs.",
            received=", ".join(names) or "none",
            expected=" and ".join(spec.name for spec in graph.inputs),
        )
    return specs


def find_outputs(graph: ServedGraph, names: Sequence[str]) -> list[TensorSpec]:
    """What the metadata says of each requested output, in the order of the request; of all if none is named.

    Raises:
        InvalidInput: a name that is unknown or given twice.
    """
    return _find(graph.outputs, names, "output") if names else list(graph.outputs)


def _find(specs: Sequence[TensorSpec], names: Sequence[str], kind: str) -> list[TensorSpec]:
    known = {spec.name: spec for spec in specs}
    wrong = [name for name in names if name not in known]
    if wrong or len(set(names)) != len(names):
        raise InvalidInput(
            f"There is no such {kind}." if wrong else f"An {kind} is named twice.",
            received=", ".join(wrong or names)[:100],
            expected=" and ".join(known),
        )
    return [known[name] for name in names]


# Parameters of extensions that are not served. Ignoring these would answer with something else than was
# asked for; ignoring any other parameter is what the protocol leaves to the server.
_NOT_SERVED = ("classification", "shared_memory_region")


def check_parameters(tensor: str, parameters: Collection[str]) -> None:
    """Refuse a tensor whose parameters ask for what is not served.

    Raises:
        InvalidInput: naming the extension.
    """
    for name in _NOT_SERVED:
        if name in parameters:
            raise InvalidInput(
                f"The tensor {tensor!r} asks for an extension that is not served.",
                received=f"parameter {name!r}",
                expected="none of the classification and shared-memory extensions",
            )


def error_text(detail: str, received: str | None, expected: str | None) -> str:
    """An error in one line, as the protocol has it."""
    if not (received and expected):
        return detail
    return f"{detail.rstrip('.')}: received {received}, expected {expected}"


async def infer(graph: ServedGraph, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run a graph in its model's own queue; all outputs by name, N rows each.

    Args:
        graph: the graph to run.
        inputs: an array for each input, of the metadata's datatype and row shape.

    Raises:
        InvalidInput: the inputs' batches differ in size, or a value is out of the model's range.
        Overloaded, ShuttingDown, InferenceFailed: as the engine says.
    """
    arrays = [inputs[spec.name] for spec in graph.inputs]
    rows = [len(array) for array in arrays]
    if len(set(rows)) > 1:
        raise InvalidInput(
            "The inputs differ in their number of rows.",
            received=" and ".join(map(str, rows)),
            expected="as many rows in each input",
        )
    results: Sequence[Array]
    if graph.role == "encoder":
        results = await graph.model.encode(arrays[0])
    else:
        capsules, target = arrays
        _check_range("digit_capsules", capsules, -MAX_COMPONENT, MAX_COMPONENT)
        _check_range("target", target, 0, len(graph.model.manifest.classes) - 1)
        results = [await graph.model.reconstruct(capsules, target)]
    return {spec.name: result for spec, result in zip(graph.outputs, results, strict=True)}


def _check_range(name: str, array: Array, low: float, high: float) -> None:
    beyond = array[(array < low) | (array > high)]
    if len(beyond):
        raise InvalidInput(
            f"The tensor {name!r} holds values out of range.",
            received=f"{beyond[0]:g}" if array.dtype == np.float32 else str(beyond[0]),
            expected=f"{low:g} to {high:g}",
        )
