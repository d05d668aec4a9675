"""The same graphs through OpenVINO, where somebody has installed it: `pip install openvino`.

It reads the fp32 encoder as it is, but for a fixed batch size: with a free one, 2026.4.1 gives no rows. It
has no QLinearConv, so the 8-bit encoder is rewritten with the pairs of QuantizeLinear and DequantizeLinear
that it looks for; the numbers are the same.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from training.graphs import names_read

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


def as_pairs(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with each QLinearConv as a Conv between the pairs that stand for it."""
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "QLinearConv":
            nodes.append(node)
            continue
        x, x_scale, x_zero, weight, w_scale, w_zero, y_scale, y_zero, bias = node.input
        name = node.output[0]
        exact = values[bias] * (values[x_scale] * values[w_scale])
        model.graph.initializer.append(numpy_helper.from_array(exact.astype(np.float32), f"{name}.bias"))
        conv: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        nodes += [
            helper.make_node("DequantizeLinear", [x, x_scale, x_zero], [f"{name}.x"]),
            helper.make_node("DequantizeLinear", [weight, w_scale, w_zero], [f"{name}.weight"], axis=0),
            helper.make_node("Conv", [f"{name}.x", f"{name}.weight", f"{name}.bias"], [f"{name}.y"], **conv),
            helper.make_node("QuantizeLinear", [f"{name}.y", y_scale, y_zero], [name]),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    read = set(names_read(nodes))
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model
