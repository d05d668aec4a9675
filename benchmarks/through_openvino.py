"""The same graphs through OpenVINO, where somebody has installed it: `pip install openvino`.

It reads the fp32 encoder as it is, but for a fixed batch size: with a free one, 2026.4.1 gives no rows. It
has no QLinearConv, so the 8-bit encoder is written with the pairs of QuantizeLinear and DequantizeLinear
that it looks for.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.graphs import PRIMARY, EncoderGraph

ABSENT = "not installed"


def version() -> str:
    """OpenVINO's, or that there is none."""
    if find_spec("openvino") is None:
        return ABSENT
    import openvino  # noqa: PLC0415 - it is no dependency of ours

    return str(openvino.__version__).split("-")[0]


def compiled(path: Path, images: NDArray[np.uint8], threads: int) -> Callable[[], NDArray[np.float32]]:
    """A function that gives the digit capsules of `images` by the graph in `path`."""
    import openvino  # noqa: PLC0415 - it is no dependency of ours

    model = openvino.convert_model(str(path), input=[("images", openvino.PartialShape(list(images.shape)))])
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # it would take bf16 where the processor has it
    }
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()

    def run() -> NDArray[np.float32]:
        capsules: NDArray[np.float32] = request.infer({"images": images})[0]
        return capsules

    return run


class PairsGraph(EncoderGraph):
    """Writes either 8-bit convolution as a Conv behind the dequantisation of what it reads."""

    def int8_features(self, scale: np.float32) -> str:
        x = self.read("images", np.float32(1 / 255))
        x = self.convolution(self.planes(x), "encoder.conv", self.weights["encoder.conv.weight"], 1)
        return self.op("QuantizeLinear", x, self.constant(scale), self.constant(np.uint8(0)))

    def int8_product(self, features: str, scale: np.float32) -> str:
        return self.convolution(self.read(features, scale), PRIMARY, self.votes * self.ordered("weight"), 2)

    def read(self, values: str, scale: np.float32) -> str:
        return self.op("DequantizeLinear", values, self.constant(scale), self.constant(np.uint8(0)))

    def convolution(self, x: str, name: str, weight: NDArray[np.float32], stride: int) -> str:
        steps, step = self.in_steps(weight)
        bias = self.weights["encoder.conv.bias"] if stride == 1 else self.ordered("bias")
        filters = self.op(
            "DequantizeLinear",
            self.constant(steps, f"{name}.weight.int8"),
            self.constant(step),
            self.constant(np.zeros(len(step), np.int8)),
            axis=0,
        )
        return self.op("Conv", x, filters, self.constant(bias), strides=[stride, stride])
