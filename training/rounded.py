"""A half-precision graph computed on a CPU as a GPU does it: rounded to half precision after each operator.

ONNX Runtime's CPU provider has few kernels for half precision. It computes the others in single precision and
takes out the casts in between, so that what it gives says nothing of the rounding. Here ONNX's own reference
does; products are summed up in single precision, as tensor cores do, and those of single-precision numbers
multiply 10 bits (TF32), as the service allows beside half precision.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor
from torch.nn import functional as F

from training.predictor import Floats, Images

Values = NDArray[Any]


class RoundedGraph:
    """An exported graph; `predict` gives what a GPU would, but for the order in which sums are added up."""

    def __init__(self, path: Path) -> None:
        self._graph = ReferenceEvaluator(onnx.load(path), new_ops=[MatMul, Conv, Mul])

    def predict(self, images: Images) -> tuple[Floats, ...]:
        """Images (B, H, W[, 3]) -> the graph's outputs, in its order."""
        answers: Any = self._graph.run(None, {"images": images})
        return tuple(answers)


class MatMul(OpRun):
    op_domain = ""

    def _run(self, a: Values, b: Values) -> tuple[Values]:
        left, right = tensor(a), tensor(b)
        return ((read(left) @ read(right)).to(left.dtype).numpy(),)


class Conv(OpRun):
    """As encoders have it: with a bias, nothing padded, all channels in one group."""

    op_domain = ""

    def _run(self, x: Values, w: Values, b: Values, *, strides: list[int] | None, **_: Any) -> tuple[Values]:
        given = tensor(x)
        weight, bias = read(tensor(w)), tensor(b).float()
        return (F.conv2d(read(given), weight, bias, strides or 1).to(given.dtype).numpy(),)


class Mul(OpRun):
    """As in the reference, but faster."""

    op_domain = ""

    def _run(self, a: Values, b: Values) -> tuple[Values]:
        return ((tensor(a) * tensor(b)).numpy(),)


def tensor(values: Values) -> Tensor:
    """Copied if it is a constant, which PyTorch must not be able to write."""
    return torch.from_numpy(np.require(values, requirements="W"))


def read(values: Tensor) -> Tensor:
    """As tensor cores read them: half precision as it is, single precision rounded to the 10 bits of TF32."""
    if values.dtype != torch.float32:
        return values.float()
    return ((values.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
