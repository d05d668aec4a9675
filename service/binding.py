"""A graph's inputs and outputs in buffers on its device, one set for each size that a batch may have there.

A batch is padded up to the next size and copied once. So the device meets few shapes, each always at the same
addresses: the warm-up settles its memory and its choice of algorithms, and CUDA graphs can be captured. What
a graph gives stays on the device until somebody fetches it, or the next graph reads it there. Nothing here
knows of CUDA; on the CPU the same code works on the same buffers. See docs/decisions/0042.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from service.manifest import Graph, TensorSpec
from service.sessions import DTYPES, Session, size_for

_graph_ids: Iterator[int] = count(1)  # ONNX Runtime keeps 0 for itself


@dataclass(frozen=True, slots=True)
class Held:
    """The first rows of a buffer on the device, as they are until its session runs again."""

    session: Session
    value: onnxruntime.OrtValue
    rows: int

    def fetch(self) -> NDArray[Any]:
        """A copy in the process's own memory."""
        with self.session.turn():
            found: NDArray[Any] = self.value.numpy()[: self.rows]
        # On the CPU this is the buffer itself.
        return found.copy() if self.value.device_name() == "cpu" else found


def fetched(values: NDArray[Any] | Held) -> NDArray[Any]:
    """An array that stays as it is, whichever kind of session gave the values."""
    return values.fetch() if isinstance(values, Held) else values


class BoundSession:
    """A session with buffers of its own. Two of them may run at once, but each in one thread at a time."""

    def __init__(
        self, session: Session, graph: Graph, sizes: Sequence[int], upstream: "BoundSession | None" = None
    ) -> None:
        """Allocate every buffer.

        Args:
            sizes: that a batch is padded to, in ascending order. A graph with convolutions should have one:
                for another one than the last, ONNX Runtime plans them anew on CUDA.
            upstream: its outputs that are inputs here by name are read where they are; `sizes` must be the
                same.
        """
        self.sizes = tuple(sizes)
        self._session = session
        above = upstream._buckets if upstream else dict.fromkeys(self.sizes)
        self._buckets: dict[int, _Bucket] = {
            rows: _Bucket(session, graph, rows, above[rows]) for rows in self.sizes
        }

    def run(self, *inputs: NDArray[Any] | Held) -> tuple[Held, ...]:
        """Inputs and outputs in the order of the graph; what upstream gave is not copied again.

        Raises:
            ValueError: too many rows, or an input of another dtype or shape than the graph's.
        """
        first = inputs[0]
        rows = first.rows if isinstance(first, Held) else len(first)
        bucket = self._buckets[size_for(rows, self.sizes)]
        with self._session.turn():
            bucket.run(inputs, rows)
        return tuple(Held(self._session, value, rows) for value in bucket.outputs.values())


class _Bucket:
    """The buffers for one size."""

    def __init__(self, session: Session, graph: Graph, rows: int, upstream: "_Bucket | None") -> None:
        self.rows = rows
        self._inference = session.inference
        given = upstream.outputs if upstream else {}
        with session.turn():
            self._inputs = {
                spec.name: given.get(spec.name) or _buffer(session, spec, rows) for spec in graph.inputs
            }
            self.outputs: dict[str, onnxruntime.OrtValue] = {
                spec.name: _buffer(session, spec, rows) for spec in graph.outputs
            }
        self._padded = [_zeros(spec, rows) for spec in graph.inputs]
        self._binding = session.inference.io_binding()
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in self.outputs.items():
            self._binding.bind_ortvalue_output(name, value)
        self._options = None
        if session.cuda_graphs:
            self._options = onnxruntime.RunOptions()
            self._options.add_run_config_entry("gpu_graph_id", str(next(_graph_ids)))

    def run(self, inputs: tuple[NDArray[Any] | Held, ...], rows: int) -> None:
        for (name, value), padded, given in zip(self._inputs.items(), self._padded, inputs, strict=True):
            if isinstance(given, Held):
                if given.value is not value:
                    raise ValueError(f"{name} is held in another buffer than upstream's for as many rows")
            else:
                value.update_inplace(_pad(name, given, padded, rows))
        self._inference.run_with_iobinding(self._binding, self._options)


def _pad(name: str, given: NDArray[Any], padded: NDArray[Any], rows: int) -> NDArray[Any]:
    """`given` if it is of the bucket's size; otherwise `padded`, with its rows and zeros behind them."""
    # ONNX Runtime would copy any array with as many elements as if it were of the buffer's type.
    if given.dtype != padded.dtype or given.shape != (rows, *padded.shape[1:]):
        raise ValueError(
            f"{name} is {given.dtype} {given.shape}, expected {padded.dtype} {(rows, *padded.shape[1:])}"
        )
    if rows == len(padded):
        return given
    padded[:rows] = given
    padded[rows:] = 0
    return padded


def _zeros(spec: TensorSpec, rows: int) -> NDArray[Any]:
    return np.zeros((rows, *spec.shape[1:]), DTYPES[spec.datatype])


def _buffer(session: Session, spec: TensorSpec, rows: int) -> onnxruntime.OrtValue:
    return onnxruntime.OrtValue.ortvalue_from_numpy(_zeros(spec, rows), session.device, 0)
