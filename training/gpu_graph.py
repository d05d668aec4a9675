"""The encoder as ONNX operators for ONNX Runtime on a GPU, in half precision; `graphs.py` is that for CPUs.

There a kernel takes as long as reading and writing its values does, so that the routing costs as much as the
convolutions. Hence half precision for whatever is as large as the classes times the capsules; digit capsules
and all squashing have the range of single precision (and its products the 10 bits of TF32). ONNX Runtime has
no fast kernel for a convolution of one channel, nor for a sum over an axis in the middle: both are products
of matrices here. Measured: docs/decisions/0050.

The letters are those of `model.py`.
"""

import math

import numpy as np
import onnx
import torch
from onnx import TensorProto

from training.graphs import EncoderGraph
from training.model import CapsNet
from training.precision import ALIGNED

HALF, SINGLE = TensorProto.FLOAT16, TensorProto.FLOAT
LARGEST = 65_504
"""In half precision."""


def gpu_encoder_graph(network: CapsNet) -> onnx.ModelProto:
    """The graph `images` -> `digit_capsules`, `capsule_lengths`."""
    graph = GpuEncoderGraph(network)
    u = graph.primary_capsules(graph.convolutions())
    v = graph.half_route(u) if fits_half(network) else graph.route(u)
    graph.finish(v)
    return graph.model()


def fits_half(network: CapsNet) -> bool:
    """Whether no image can bring the softmax out of half precision, by the norms of the matrices.

    An agreement is u . W^T v, and the logits are the agreement with the sum of all v so far; u and v are
    shorter than 1. So the softmax needs no subtraction of the largest logit. What does not fit, and matrices
    that a group shares, are routed as on a CPU.
    """
    config = network.config
    norms = torch.linalg.matrix_norm(network.encoder.digit_capsules.weight.detach(), ord=2)
    largest_logit = float(norms.max()) * (config.routing_iterations - 1)
    return not config.shared_weights and largest_logit < math.log(LARGEST / len(config.classes))


class GpuEncoderGraph(EncoderGraph):
    """Nodes in the order in which they run. Methods take and give the names of values."""

    def convolutions(self) -> str:
        """Both convolutions, (B, I * G, rows, columns) in single precision."""
        return self.op("Cast", self.second_convolution(self.features(), HALF), to=SINGLE)

    def features(self) -> str:
        """The first convolution as a product with every patch of the image, and ReLU.

        Channels come out innermost, as convolutions on a GPU want them, so the transposition at the end is
        one of names alone. A patch ends with a 1, for the bias, and more of them up to an even width.
        """
        config, kernel = self.config, self.config.kernel_size
        rows, columns = config.height - kernel + 1, config.width - kernel + 1
        pixels, taps = config.height * config.width * config.channels, kernel**2 * config.channels
        more = ALIGNED - taps % ALIGNED  # at least one
        x = self.op("Reshape", self.op("Cast", self.scaled_images(), to=HALF), self.axes(0, pixels))
        x = self.op("Pad", x, self.axes(0, 0, 0, 1), self.constant(np.float16(1), "one.half"))
        # Where the numbers of a patch lie: its corner's place, and from there those of the kernel's taps.
        places = np.arange(pixels, dtype=np.int32).reshape(config.height, config.width, config.channels)
        corners = places[:rows, :columns, :1].reshape(-1, 1)
        inside = places[:kernel, :kernel].transpose(2, 0, 1).reshape(1, -1)
        index = self.op("Add", self.constant(corners, "corners"), self.constant(inside, "taps"))
        ones = self.op(
            "Expand", self.constant(np.array([[pixels]], np.int32), "last"), self.axes(rows * columns, more)
        )
        patches = self.op("Gather", x, self.op("Concat", index, ones, axis=1), axis=1)
        weight = self.op(
            "Concat",
            self.op(
                "Reshape", self.weight("encoder.conv.weight", HALF), self.axes(config.conv_channels, taps)
            ),
            self.op("Reshape", self.weight("encoder.conv.bias", HALF), self.axes(config.conv_channels, 1)),
            self.constant(np.zeros((config.conv_channels, more - 1), np.float16)),
            axis=1,
        )
        x = self.op("Relu", self.op("MatMul", patches, self.op("Transpose", weight, perm=[1, 0])))
        x = self.op("Reshape", x, self.axes(0, rows, columns, config.conv_channels))
        return self.op("Transpose", x, perm=[0, 3, 1, 2])

    def squash(self, s: str, axis: int) -> str:
        """Of (B, I, N) or (K, B, D) over the named axis, whose sum is a product with ones."""
        squares = self.op("Mul", s, s)
        if axis == 1:
            ones = np.ones((1, self.config.primary_dimensions), np.float32)
            squared = self.op("MatMul", self.constant(ones, "ones_primary"), squares)
        else:
            ones = np.ones((self.config.digit_dimensions, 1), np.float32)
            squared = self.op("MatMul", squares, self.constant(ones, "ones_digit"))
        return self.op("Mul", s, self.squash_factor(squared))

    def half_route(self, u: str) -> str:
        """`route` in half precision: u (B, I, N) to v (K, B, D), which are not."""
        config = self.config
        classes, dimensions = len(config.classes), config.primary_dimensions
        capsules, inner = config.primary_count, config.primary_dimensions * config.primary_count
        weight, weight_t = self.matrices(HALF)
        u = self.op("Cast", u, to=HALF)
        over_dimensions = self.constant(np.ones((1, dimensions), np.float16), "ones_dimensions")
        over_classes = self.constant(np.ones((1, classes), np.float16), "ones_classes")

        def output(pooled: str) -> str:
            """v (K, B, D) of pooled votes (1 or K, B, I * N)."""
            return self.digit_capsules(self.op("Cast", self.op("MatMul", pooled, weight), to=SINGLE))

        uniform = self.op("Mul", u, self.constant(np.float16(1 / classes)))
        v = output(self.op("Reshape", uniform, self.axes(1, -1, inner)))
        total = v
        for _ in range(config.routing_iterations - 1):
            back = self.op("MatMul", self.op("Cast", total, to=HALF), weight_t)  # W^T v
            back = self.op("Reshape", back, self.axes(classes, -1, dimensions, capsules))
            logits = self.op("MatMul", over_dimensions, self.op("Mul", back, u))  # (K, B, 1, N)
            raised = self.op("Exp", logits)
            whole = self.op("MatMul", over_classes, self.op("Reshape", raised, self.axes(classes, -1)))
            coupling = self.op("Div", raised, self.op("Reshape", whole, self.axes(-1, 1, capsules)))
            coupled = self.op("Mul", coupling, u)  # (K, B, I, N)
            v = output(self.op("Reshape", coupled, self.axes(classes, -1, inner)))
            total = self.op("Add", total, v)
        return v
