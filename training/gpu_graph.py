"""Encoder and decoder in one graph for ONNX Runtime on a GPU, in half precision; `graphs.py` is for CPUs.

There a kernel takes as long as reading and writing its values does, so that the routing costs as much as the
convolutions. Hence half precision for whatever is as large as the classes times the capsules; digit capsules
and all squashing have the range of single precision (and its products the 10 bits of TF32). ONNX Runtime has
no fast kernel for a convolution of one channel, nor for a sum over an axis: both are products of matrices
here. Where it multiplies number by number it is fast if the smaller operand is repeated as a whole, hence the
long rows. And the longest capsule is drawn in the same run, since each wait for the GPU hands it to another
process. Measured: docs/decisions/0050.

The letters are those of `model.py`; here the I numbers of a capsule lie together, and capsule behind capsule.
"""

import math

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from training.graphs import EncoderGraph, softmax_fits
from training.model import CapsNet
from training.precision import ALIGNED

HALF, SINGLE = TensorProto.FLOAT16, TensorProto.FLOAT
LARGEST = 65_504
"""In half precision."""
TOGETHER = 16
"""So many capsules, or the largest divisor of it that divides theirs, are a row where numbers of each are
summed up: rows of 128 numbers are what tensor cores take best."""


def predictor_graph(network: CapsNet) -> onnx.ModelProto:
    """The graph `images` -> `digit_capsules`, `capsule_lengths`, `reconstructions`.

    Of each image the longest capsule is drawn, the first of equals.
    """
    graph = PredictorGraph(network)
    if fits_half(network):
        v = graph.half_route(graph.capsules())
    else:
        v = graph.route(graph.primary_capsules(graph.convolutions()))
    graph.finish(v)
    graph.draw()
    return graph.model()


def fits_half(network: CapsNet) -> bool:
    """Whether the softmax fits half precision. What does not, and matrices that a group shares, are routed
    as on a CPU."""
    return not network.config.shared_weights and softmax_fits(network, LARGEST)


class PredictorGraph(EncoderGraph):
    """Nodes in the order in which they run. Methods take and give the names of values."""

    def __init__(self, network: CapsNet) -> None:
        super().__init__(network)
        self.weights |= {
            f"decoder.{name}": parameter.detach().cpu().numpy()
            for name, parameter in network.decoder.named_parameters()
        }

    def outputs(self) -> dict[str, tuple[int, ...]]:
        return {**super().outputs(), "reconstructions": self.config.image_shape}

    def features(self, images: str = "images") -> str:
        """The first convolution as a product with every patch of the image, and ReLU.

        In half precision. Channels come out innermost, as convolutions on a GPU want them, so the
        transposition at the end is one of names alone. A patch ends with a 1, for the bias, and more of them
        up to an even width.
        """
        config, kernel = self.config, self.config.kernel_size
        rows, columns = config.height - kernel + 1, config.width - kernel + 1
        pixels, taps = config.height * config.width * config.channels, kernel**2 * config.channels
        more = ALIGNED - taps % ALIGNED  # at least one
        x = self.op("Reshape", self.op("Cast", self.scaled_images(images), to=HALF), self.axes(0, pixels))
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

    def convolutions(self) -> str:
        """Both convolutions, (B, I * G, rows, columns) in single precision, for `route`."""
        return self.op("Cast", self.second_convolution(self.features(), HALF), to=SINGLE)

    def capsules(self) -> str:
        """Both convolutions and squashing, u (B * N, I) in half precision, N ordered (rows, columns, G)."""
        dimensions = self.config.primary_dimensions
        x = self.op("Conv", self.features(), *self.filters(HALF), strides=[2, 2])
        x = self.op("Cast", self.op("Transpose", x, perm=[0, 2, 3, 1]), to=SINGLE)
        squared = self.sums(self.op("Mul", x, x), SINGLE)
        factor = self.squash_factor(self.op("Reshape", squared, self.axes(-1, 1)))
        u = self.op("Mul", self.op("Reshape", x, self.axes(-1, dimensions)), factor)
        return self.op("Cast", u, to=HALF)

    def sums(self, values: str, element: int) -> str:
        """(…, I) -> (…) over the I numbers of each capsule, as rows of several capsules: a product."""
        dimensions = self.config.primary_dimensions
        together = math.gcd(TOGETHER, self.config.primary_count)
        ones: NDArray[np.float32] = np.kron(np.eye(together), np.ones((dimensions, 1))).astype(np.float32)
        rows = self.op("Reshape", values, self.axes(-1, together * dimensions))
        if element == HALF:
            return self.op("MatMul", rows, self.constant(ones.astype(np.float16), "ones.half"))
        return self.op("MatMul", rows, self.constant(ones, "ones"))

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
        """Routing by agreement of u (B * N, I) in half precision to v (K, B, D) in single."""
        config = self.config
        classes, dimensions = len(config.classes), config.digit_dimensions
        inner = config.primary_count * config.primary_dimensions
        weight = self.by_position()
        weight_t = self.op("Transpose", weight, perm=[0, 2, 1])
        side_by_side = self.op("Transpose", weight, perm=[1, 0, 2])
        side_by_side = self.op("Reshape", side_by_side, self.axes(inner, classes * dimensions))
        one_row = self.op("Reshape", u, self.axes(1, -1))
        ones = self.constant(np.ones((1, classes), np.float16), "ones_classes")

        uniform = self.op("Reshape", u, self.axes(-1, inner))
        uniform = self.op("Mul", uniform, self.constant(np.float16(1 / classes)))
        s = self.op("Reshape", self.op("MatMul", uniform, side_by_side), self.axes(-1, classes, dimensions))
        v = self.digit_capsules(self.op("Cast", self.op("Transpose", s, perm=[1, 0, 2]), to=SINGLE))
        total = v
        for _ in range(config.routing_iterations - 1):
            back = self.op("MatMul", self.op("Cast", total, to=HALF), weight_t)  # W^T v, (K, B, N * I)
            products = self.op("Mul", self.op("Reshape", back, self.axes(classes, -1)), one_row)
            raised = self.op("Exp", self.sums(products, HALF))
            raised = self.op("Reshape", raised, self.axes(classes, -1))  # (K, B * N)
            coupling = self.op("Div", raised, self.op("MatMul", ones, raised))
            coupled = self.op("Mul", self.op("Reshape", coupling, self.axes(classes, -1, 1)), u)
            s = self.op("MatMul", self.op("Reshape", coupled, self.axes(classes, -1, inner)), weight)
            v = self.digit_capsules(self.op("Cast", s, to=SINGLE))
            total = self.op("Add", total, v)
        return v

    def by_position(self) -> str:
        """The transformation matrices class by class, (K, N * I, D), N ordered (rows, columns, G)."""
        config = self.config
        classes, groups = len(config.classes), config.primary_groups
        width = config.primary_dimensions * config.digit_dimensions
        weight = self.weight("encoder.digit_capsules.weight", HALF)
        weight = self.op("Reshape", weight, self.axes(classes, groups, -1, width))
        weight = self.op("Transpose", weight, perm=[0, 2, 1, 3])
        return self.op("Reshape", weight, self.axes(classes, -1, config.digit_dimensions))

    def draw(self) -> None:
        """The decoder on the longest capsule of each image, from the other two outputs."""
        config = self.config
        classes = len(config.classes)
        # Not ArgMax, which ONNX Runtime has no kernel for on a GPU.
        _, longest = self.ops("TopK", 2, "capsule_lengths", self.axes(1))
        winner = self.op("Equal", longest, self.constant(np.arange(classes), "classes"))
        winner = self.op("Unsqueeze", self.op("Cast", winner, to=SINGLE), self.axes(2))
        x = self.op("Mul", "digit_capsules", winner)
        x = self.op("Reshape", x, self.axes(-1, classes * config.digit_dimensions))
        for layer, activation in ((0, "Relu"), (2, "Relu"), (4, "Sigmoid")):
            weight = self.op("Transpose", self.weight(f"decoder.layers.{layer}.weight"), perm=[1, 0])
            x = self.op("Add", self.op("MatMul", x, weight), self.weight(f"decoder.layers.{layer}.bias"))
            x = self.op(activation, x)
        self.op("Reshape", x, self.axes(-1, *config.image_shape), out="reconstructions")
