"""A training step as a CUDA graph: its hundreds of kernels, each shorter than its launch, launched as one."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from training.compose import Batch

WARM_UP = 3
"""Steps of a batch size that run as they are before one is captured: libraries choose, and allocate."""

Outcome = tuple[Tensor, ...]
Step = Callable[[Batch, int], Outcome]
"""Takes a process's part of a batch, and the size of the whole of it."""


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    batch: Batch
    outcome: Outcome

    def run(self, batch: Batch) -> Outcome:
        for held, given in zip(_tensors(self.batch), _tensors(batch), strict=True):
            held.copy_(given)
        self.graph.replay()
        return self.outcome


class CapturedStep:
    """Does what `step` does, to the bit. What it gives is overwritten by the next step.

    `step` must keep to the device, and change nothing but tensors that stay where they are.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._stream = torch.cuda.Stream()
        self._seen: Counter[tuple[int, int]] = Counter()
        self._graphs: dict[tuple[int, int], _Graph] = {}

    def __call__(self, batch: Batch, whole: int) -> Outcome:
        size = len(batch.images), whole
        if size not in self._graphs:
            self._seen[size] += 1
            if self._seen[size] <= WARM_UP:
                return self._as_it_is(batch, whole)
            self._graphs[size] = self._capture(batch, whole)
        return self._graphs[size].run(batch)

    def _as_it_is(self, batch: Batch, whole: int) -> Outcome:
        """On another stream than the default one, whose state a capture must not meet."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            outcome = self._step(batch, whole)
        torch.cuda.current_stream().wait_stream(self._stream)
        return outcome

    def _capture(self, batch: Batch, whole: int) -> _Graph:
        """Nothing is computed yet."""
        held = Batch(*(tensor.clone() for tensor in _tensors(batch)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            outcome = self._step(held, whole)
        return _Graph(graph, held, outcome)


def _tensors(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.images, batch.labels, batch.targets
