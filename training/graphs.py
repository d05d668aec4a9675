"""The encoder as ONNX operators, written for ONNX Runtime's speed on a CPU; `model.py` is the same to read.

What is computed is the same as there, and export compares the two. What differs is the order of the axes, so
that no intermediate value is ever transposed: the channels of the second convolution are ordered dimension
by dimension (I, G) instead of group by group, by a permutation of its weights, and a grid of primary
capsules is then (B, I, N) with N innermost, which every sum and product reads as it lies. Initializers keep
PyTorch's names, shapes and half precision; what changes them is folded when a runtime loads the graph.

The letters are those of `model.py`.
"""

import math
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch.nn import functional as F

from training.config import ModelConfig
from training.model import EPSILON, CapsNet, as_channels

OPSET = 20
FEW = 4
"""Images up to which storing u_hat is faster on a CPU; measured, see docs/decisions/0020."""
WEIGHT_STEPS = 64
"""Of an 8-bit convolution's weights, to either side of 0: one bit less than there is. x86 processors without
VNNI sum pairs of products in 16 bits, and two of a byte and such a weight, 2 * 255 * 64, fit."""
ROWS = 3
"""How many rows of the 8-bit filters one product takes: with all nine the service needs 25 MB more, and with
one at a time it is slower; measured, see docs/decisions/0020."""
LARGEST = float(np.finfo(np.float32).max)
LARGE = 1024
"""Weights of at least so many numbers are stored in half precision."""
PRIMARY = "encoder.primary_capsules.conv"


@torch.no_grad()
def largest_feature(network: CapsNet, images: Tensor) -> float:
    """The largest that the first convolution and ReLU give of `images` (B, H, W[, 3]) uint8."""
    conv = network.encoder.conv
    largest = max(float(F.relu(conv(as_channels(batch))).max()) for batch in images.split(64))
    return max(largest, 1e-6)  # features that are always zero still need a scale


@torch.no_grad()
def softmax_fits(network: CapsNet, largest: float) -> bool:
    """Whether no image can bring the routing's softmax beyond `largest`, by the norms of the matrices.

    An agreement is u . W^T v, and the logits are the agreement with the sum of all v so far; u and v are
    shorter than 1. What fits needs no subtraction of the largest logit.
    """
    config = network.config
    norms = torch.linalg.matrix_norm(network.encoder.digit_capsules.weight, ord=2)
    return float(norms.max()) * (config.routing_iterations - 1) < math.log(largest / len(config.classes))


class EncoderGraph:
    """Nodes in the order in which they run. Methods take and give the names of values."""

    def __init__(self, network: CapsNet) -> None:
        self.config: ModelConfig = network.config
        self.weights = {
            f"encoder.{name}": parameter.detach().cpu().numpy()
            for name, parameter in network.encoder.named_parameters()
        }
        # What `scaled_votes` divides by, all but the bias: the weights then, which are folded.
        self.votes = np.float32(1 / self.config.primary_groups if self.config.scaled_votes else 1)
        self.softmax_fits = softmax_fits(network, LARGEST)
        self.nodes: list[onnx.NodeProto] = []
        self.numbers = count()
        self.initializers: dict[str, onnx.TensorProto] = {}

    def op(self, kind: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        number = next(self.numbers)
        name = out or f"{kind}_{number}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def ops(self, kind: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        """As `op`, of an operator with several outputs."""
        name = f"{kind}_{next(self.numbers)}"
        outputs = [f"{name}.{number}" for number in range(count)]
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, name=name, **attributes))
        return outputs

    def constant(self, value: NDArray[Any] | np.generic, name: str = "") -> str:
        name = name or f"constant_{len(self.initializers)}"
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def axes(self, *values: int) -> str:
        """Axes or a shape, one constant for equal ones."""
        return self.constant(np.array(values, np.int64), "axes_" + "_".join(map(str, values)))

    def weight(self, name: str, element: int = TensorProto.FLOAT) -> str:
        """A parameter by PyTorch's name; large ones are stored in half precision, and widened if need be."""
        value = self.weights[name]
        if value.size < LARGE:
            stored, kept = self.constant(value, name), TensorProto.FLOAT
        else:
            stored, kept = self.constant(value.astype(np.float16), f"{name}.half"), TensorProto.FLOAT16
        return stored if kept == element else self.op("Cast", stored, to=element)

    def planes(self, images: str) -> str:
        """(B, H, W[, 3]) -> (B, channels, H, W)."""
        if self.config.channels == 1:
            return self.op("Unsqueeze", images, self.axes(1))
        return self.op("Transpose", images, perm=[0, 3, 1, 2])

    def by_dimension(self, values: str, *rest: int) -> str:
        """Reorder the first axis from (G, I) to (I, G)."""
        groups, dimensions = self.config.primary_groups, self.config.primary_dimensions
        values = self.op("Reshape", values, self.axes(groups, dimensions, *rest))
        values = self.op("Transpose", values, perm=[1, 0, *range(2, 2 + len(rest))])
        return self.op("Reshape", values, self.axes(groups * dimensions, *rest))

    def convolutions(self) -> str:
        """Both convolutions, (B, I * G, rows, columns)."""
        return self.second_convolution(self.features())

    def scaled_images(self, images: str = "images") -> str:
        """Bytes to numbers in [0, 1]."""
        numbers = self.op("Cast", images, to=TensorProto.FLOAT)
        return self.op("Mul", numbers, self.constant(np.float32(1 / 255), "level"))

    def features(self, images: str = "images") -> str:
        """The first convolution and ReLU, (B, conv_channels, rows, columns)."""
        x = self.planes(self.scaled_images(images))
        x = self.op("Conv", x, self.weight("encoder.conv.weight"), self.weight("encoder.conv.bias"))
        return self.op("Relu", x)

    def second_convolution(self, features: str, element: int = TensorProto.FLOAT) -> str:
        """(B, I * G, rows, columns) of features, all in the arithmetic of `element`."""
        weight, bias = self.filters(element)
        weight = self.by_dimension(weight, self.config.conv_channels, *[self.config.kernel_size] * 2)
        return self.op("Conv", features, weight, self.by_dimension(bias), strides=[2, 2])

    def filters(self, element: int = TensorProto.FLOAT) -> tuple[str, str]:
        """Weight and bias of the second convolution, first axis (G, I), in the arithmetic of `element`."""
        weight = self.weight(f"{PRIMARY}.weight", element)
        if self.votes != 1:
            weight = self.op("Mul", weight, self.op("Cast", self.constant(self.votes), to=element))
        return weight, self.weight(f"{PRIMARY}.bias", element)

    def int8_convolutions(self, largest: float) -> str:
        """Both convolutions on bytes with 7-bit weights, a scale for each output channel, summed in 32 bits.

        An image's bytes are exactly its numbers on the scale 1/255, and behind ReLU a byte without a sign
        wastes nothing. (B, I * G, positions).
        """
        scale = np.float32(largest / 255)
        return self.int8_product(self.int8_features(scale), scale)

    def int8_features(self, scale: np.float32) -> str:
        """The first convolution and ReLU as bytes, of `scale` each, (B, conv_channels, rows, columns)."""
        pixel, zero = np.float32(1 / 255), np.uint8(0)
        bias = self.weights["encoder.conv.bias"]
        # Or the bias of a filter of next to nothing would be too many steps for 32 bits.
        steps, step = self.in_steps(self.weights["encoder.conv.weight"], np.abs(bias) / (pixel * 2**30))
        return self.op(
            "QLinearConv",
            self.planes("images"),
            self.constant(pixel),
            self.constant(zero),
            self.constant(steps, "encoder.conv.weight.int8"),
            self.constant(step),
            self.constant(np.zeros(len(step), np.int8)),
            self.constant(scale),
            self.constant(zero),
            self.constant(np.rint(bias / (pixel * step)).astype(np.int32), "encoder.conv.bias.int32"),
        )

    def int8_product(self, features: str, scale: np.float32) -> str:
        """The second convolution, of bytes, (B, I * G, positions), as products with the patches of a batch.

        ONNX Runtime's QLinearConv reads all filters again for every few positions of an image, and has no
        kernel for AMX, where MatMulInteger has; see docs/decisions/0020.
        """
        config, kernel = self.config, self.config.kernel_size
        steps, step = self.in_steps(self.votes * self.ordered("weight"))
        filters = steps.transpose(2, 3, 1, 0)  # (kernel, kernel, conv_channels, I * G)
        rows, columns = (side - kernel + 1 for side in (config.height, config.width))
        places = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns)
        patches = sliding_window_view(places, (kernel, kernel))[::2, ::2].reshape(-1, kernel, kernel)
        # Channels last, as QLinearConv computes them, so that both transpositions are left out.
        x = self.op("Transpose", features, perm=[0, 2, 3, 1])
        x = self.op("Reshape", x, self.axes(0, rows * columns, config.conv_channels))
        whole = ""
        for top in range(0, kernel, ROWS):
            seen = patches[:, top : top + ROWS].reshape(len(patches), -1)
            part = self.op("Gather", x, self.constant(seen, f"patches.{top}"), axis=1)
            part = self.op("Reshape", part, self.axes(-1, seen.shape[1] * config.conv_channels))
            weight = np.ascontiguousarray(filters[top : top + ROWS].reshape(-1, len(step)))
            weight_name = self.constant(weight, f"{PRIMARY}.weight.int8.{top}")
            part = self.op("MatMulInteger", part, weight_name, self.constant(np.uint8(0)))
            whole = self.op("Add", whole, part) if whole else part
        x = self.op("Mul", self.op("Cast", whole, to=TensorProto.FLOAT), self.constant(scale * step))
        x = self.op("Add", x, self.constant(self.ordered("bias")))
        x = self.op("Reshape", x, self.axes(-1, len(patches), len(step)))
        return self.op("Transpose", x, perm=[0, 2, 1])

    def ordered(self, name: str) -> NDArray[np.float32]:
        """A parameter of the second convolution, its first axis reordered from (G, I) to (I, G)."""
        value: NDArray[np.float32] = self.weights[f"{PRIMARY}.{name}"]
        groups, dimensions = self.config.primary_groups, self.config.primary_dimensions
        return value.reshape(groups, dimensions, -1).swapaxes(0, 1).reshape(value.shape)

    def in_steps(
        self, weight: NDArray[np.float32], least: NDArray[np.float32] | float = 0
    ) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Filters as whole steps, and how much a step is for each filter, `least` or more."""
        largest = np.abs(weight).reshape(len(weight), -1).max(axis=1)
        step = np.maximum(largest, np.float32(1e-12)) / np.float32(WEIGHT_STEPS)
        step = np.maximum(step, np.float32(least))
        return np.rint(weight / step[:, None, None, None]).astype(np.int8), step

    def primary_capsules(self, channels: str) -> str:
        """(B, I * G, rows, columns) or (B, I * G, positions) -> u (B, I, N)."""
        u = self.op("Reshape", channels, self.axes(0, self.config.primary_dimensions, -1))
        return self.squash(u, axis=1)

    def squash(self, s: str, axis: int) -> str:
        squared = self.op("ReduceSum", self.op("Mul", s, s), self.axes(axis), keepdims=1)
        return self.op("Mul", s, self.squash_factor(squared))

    def squash_factor(self, squared: str) -> str:
        """What squashing multiplies a vector with, of its squared length."""
        root = self.op("Sqrt", self.op("Add", squared, self.constant(np.float32(EPSILON), "epsilon")))
        return self.op("Div", root, self.op("Add", squared, self.constant(np.float32(1), "one")))

    def route(self, u: str) -> str:
        """Routing by agreement of u (B, I, N) to v (K, B, D), without u_hat, as `CapsuleLayer` has it.

        The logits of an iteration are the agreement with the sum of all v so far, so nothing but that sum
        is carried along.
        """
        return self.route_without_u_hat(u, *self.matrices())

    def matrices(self) -> tuple[str, str]:
        """The transformation matrices class by class, (K, I * G, D), and the same transposed."""
        config = self.config
        groups = config.primary_groups if config.shared_weights else config.primary_count
        weight = self.weight("encoder.digit_capsules.weight")
        weight = self.op("Transpose", weight, perm=[0, 2, 1, 3])
        shape = len(config.classes), config.primary_dimensions * groups, config.digit_dimensions
        weight = self.op("Reshape", weight, self.axes(*shape))
        return weight, self.op("Transpose", weight, perm=[0, 2, 1])

    def route_without_u_hat(self, u: str, weight: str, weight_t: str) -> str:
        """The routing on `matrices`, which every iteration reads twice."""
        config = self.config
        classes, dimensions = len(config.classes), config.primary_dimensions
        groups = config.primary_groups if config.shared_weights else config.primary_count
        inner = dimensions * groups

        def pool(values: str, first: int) -> str:
            """(first, B, I, N) -> (first, B, I * G), summed over the positions that share a matrix."""
            if config.shared_weights:
                values = self.op(
                    "Reshape", values, self.axes(first, -1, inner, config.primary_count // groups)
                )
                return self.op("ReduceSum", values, self.axes(3), keepdims=0)
            return self.op("Reshape", values, self.axes(first, -1, inner))

        def output(pooled: str) -> str:
            """v (K, B, D) of pooled votes (1 or K, B, I * G)."""
            return self.digit_capsules(self.op("MatMul", pooled, weight))

        uniform = self.op("Mul", u, self.constant(np.float32(1 / classes)))
        v = output(pool(uniform, 1))
        total = v
        for _ in range(config.routing_iterations - 1):
            back = self.op("MatMul", total, weight_t)  # W^T v, (K, B, I*G)
            if config.shared_weights:
                positions = config.primary_count // groups
                back = self.op("Reshape", back, self.axes(classes, -1, dimensions, groups, 1))
                by_group = self.op("Reshape", u, self.axes(-1, dimensions, groups, positions))
                products = self.op("Mul", back, by_group)
                products = self.op(
                    "Reshape", products, self.axes(classes, -1, dimensions, config.primary_count)
                )
            else:
                back = self.op("Reshape", back, self.axes(classes, -1, dimensions, config.primary_count))
                products = self.op("Mul", back, u)
            logits = self.op("ReduceSum", products, self.axes(2), keepdims=0)  # (K, B, N)
            # The softmax over K, its division moved to u, which has K times fewer numbers than c.
            raised = self.raised(logits)
            whole = self.op("ReduceSum", raised, self.axes(0), keepdims=0)  # (B, N)
            shares = self.op("Div", u, self.op("Unsqueeze", whole, self.axes(1)))
            coupled = self.op("Mul", self.op("Unsqueeze", raised, self.axes(2)), shares)  # c u, (K, B, I, N)
            v = output(pool(coupled, classes))
            total = self.op("Add", total, v)
        return v

    def raised(self, logits: str) -> str:
        """exp of logits (K, …), less the largest over K where it might overflow otherwise."""
        if not self.softmax_fits:
            logits = self.op("Sub", logits, self.op("ReduceMax", logits, self.axes(0), keepdims=1))
        return self.op("Exp", logits)

    def digit_capsules(self, s: str) -> str:
        """v (K, B, D) of weighted sums s."""
        if self.config.capsule_biases:
            s = self.op("Add", s, self.weight("encoder.digit_capsules.bias"))
        return self.squash(s, axis=2)

    def route_by_size(self, u: str) -> str:
        """`route`, which for few images stores u_hat, instead of reading all matrices again.

        Not where a group's capsules share their matrices, which are few to read.
        """
        config = self.config
        by_class = self.matrices()
        if config.shared_weights:
            return self.route_without_u_hat(u, *by_class)
        by_capsule = self.op("Transpose", self.weight("encoder.digit_capsules.weight"), perm=[1, 2, 0, 3])
        width = len(config.classes) * config.digit_dimensions
        shape = config.primary_count, config.primary_dimensions, width
        by_capsule = self.op("Reshape", by_capsule, self.axes(*shape))
        few, many = self.by_size(u, FEW)
        v = self.route_with_u_hat(few, by_capsule), self.route_without_u_hat(many, *by_class)
        return self.op("Concat", *v, axis=1)

    def by_size(self, values: str, most: int) -> tuple[str, str]:
        """Values (B, …) for one way of two, whose results are concatenated: one has them all, the other none.

        The first has up to `most`. Branches would do as well, but for what they cost: ONNX Runtime plans no
        memory for graphs with some, and loses its blocked layout for convolutions in them.
        """
        size = self.op("Shape", values, start=0, end=1)
        few = self.op("LessOrEqual", size, self.constant(np.array([most], np.int64), f"up_to_{most}"))
        none = self.axes(0)
        first = self.op("Where", few, size, none)
        return (
            self.op("Slice", values, none, first, none),
            self.op("Slice", values, first, size, none),
        )

    def route_with_u_hat(self, u: str, weight: str) -> str:
        """The routing by procedure 1, on u_hat (K, B, N, D); `weight` is (N, I, K * D)."""
        config = self.config
        classes, dimensions, capsules = len(config.classes), config.digit_dimensions, config.primary_count
        u_hat = self.op("MatMul", self.op("Transpose", u, perm=[2, 0, 1]), weight)  # (N, B, K * D)
        u_hat = self.op("Reshape", u_hat, self.axes(capsules, -1, classes, dimensions))
        u_hat = self.op("Transpose", u_hat, perm=[2, 1, 0, 3])

        def output(s: str) -> str:
            """v (K, B, 1, D)."""
            if config.capsule_biases:
                bias = self.op("Unsqueeze", self.weight("encoder.digit_capsules.bias"), self.axes(1))
                s = self.op("Add", s, bias)
            return self.squash(s, axis=3)

        whole = self.op("ReduceSum", u_hat, self.axes(2), keepdims=1)
        v = output(self.op("Mul", whole, self.constant(np.float32(1 / classes))))
        total = v
        for _ in range(config.routing_iterations - 1):
            logits = self.op(
                "MatMul", u_hat, self.op("Reshape", total, self.axes(classes, -1, dimensions, 1))
            )
            logits = self.op("Reshape", logits, self.axes(classes, -1, 1, capsules))
            raised = self.raised(logits)  # ONNX Runtime's Softmax over the first axis takes thrice as long
            coupling = self.op("Div", raised, self.op("ReduceSum", raised, self.axes(0), keepdims=1))
            v = output(self.op("MatMul", coupling, u_hat))
            total = self.op("Add", total, v)
        return self.op("Reshape", v, self.axes(classes, -1, dimensions))

    def finish(self, v: str) -> None:
        """v (K, B, D) to the two outputs."""
        capsules = self.op("Transpose", v, out="digit_capsules", perm=[1, 0, 2])
        squared = self.op("ReduceSum", self.op("Mul", capsules, capsules), self.axes(2), keepdims=0)
        self.op(
            "Sqrt",
            self.op("Add", squared, self.constant(np.float32(EPSILON), "epsilon")),
            out="capsule_lengths",
        )

    def outputs(self) -> dict[str, tuple[int, ...]]:
        """Of the graph: shapes without the batch."""
        classes = len(self.config.classes)
        return {"digit_capsules": (classes, self.config.digit_dimensions), "capsule_lengths": (classes,)}

    def model(self) -> onnx.ModelProto:
        outputs = self.outputs()
        read = {name for node in self.nodes for name in node.input}

        def value(name: str, element: int, *shape: int) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, element, ["batch", *shape])

        graph = helper.make_graph(
            [node for node in self.nodes if set(node.output) & (read | set(outputs))],
            "encoder",
            [value("images", TensorProto.UINT8, *self.config.image_shape)],
            [value(name, TensorProto.FLOAT, *shape) for name, shape in outputs.items()],
            [tensor for name, tensor in self.initializers.items() if name in read],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def encoder_graph(
    network: CapsNet, largest: float | None = None, writer: type[EncoderGraph] = EncoderGraph
) -> onnx.ModelProto:
    """The graph `images` -> `digit_capsules`, `capsule_lengths`.

    Args:
        largest: the largest feature, up to which the eight bits of int8 convolutions reach; without one
            the convolutions are in fp32, as all else is in any case.
        writer: what writes the nodes.
    """
    graph = writer(network)
    if largest is not None:
        u = graph.primary_capsules(graph.int8_convolutions(largest))
        # In 8 bits it is for CPUs alone.
        v = graph.route_by_size(u)
    else:
        v = graph.route(graph.primary_capsules(graph.convolutions()))
    graph.finish(v)
    return graph.model()


def save_sharing(model: onnx.ModelProto, path: Path, *holders: Path) -> None:
    """Save `model` as `path`; weights that a file of `holders` beside it has too are read from there.

    Those in half precision alone, which a runtime converts or copies while it loads. What it needs as it is
    ONNX Runtime would not read: it would map the file, and answer otherwise once that changes.
    """
    for holder in holders:
        held = holder.read_bytes()
        for tensor in model.graph.initializer:
            half = tensor.data_type == TensorProto.FLOAT16
            offset = held.find(tensor.raw_data) if half and len(tensor.raw_data) >= LARGE else -1
            if offset >= 0:
                length = len(tensor.raw_data)
                tensor.ClearField("raw_data")
                tensor.data_location = TensorProto.EXTERNAL
                for key, entry in (("location", holder.name), ("offset", offset), ("length", length)):
                    tensor.external_data.add(key=key, value=str(entry))
    onnx.save(model, path)
