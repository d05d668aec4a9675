"""The fp32 encoder for ONNX Runtime on a CPU: the second convolution of several images by Winograd.

The same mathematics as in `graphs.py` with a quarter of the multiplications, but weights two and a half times
as large, which a lone image does not repay; so the batch's size decides. Measured: docs/decisions/0020.

A convolution of stride 2 is the sum of four of stride 1, each on every other row and column. For three
outputs in a row, each of five taps, F(3, 5) multiplies at seven points: y = A ((G w) * (B x)). In two
dimensions that is 49 matrix products over channels and phases at once. Source: Lavin and Gray, "Fast
Algorithms for Convolutional Neural Networks", 2015; the matrices are Toom and Cook's, from the points below
and infinity.

The letters are those of `model.py`; here also C channels in, P phases of an axis (2), T tiles of an axis, S
points (7).
"""

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from training.graphs import PRIMARY, EncoderGraph

Matrix = NDArray[np.float64]

DIRECT = 1
"""Images up to which the direct convolution is faster; measured, see docs/decisions/0020."""
OUTPUTS, PHASES, TAPS = 3, 2, 5
POINTS = (0.0, 1.0, -1.0, 0.5, -0.5, 2.0)
"""For five taps, beside infinity; fewer take the first of them."""


def transforms(taps: int) -> tuple[Matrix, Matrix, Matrix]:
    """A (3, S), G (S, taps) and B (S, S) of y = A ((G w) * (B x)) for y_j = sum of w_k x_(j + k)."""
    size = OUTPUTS + taps - 1
    points = np.array(POINTS[: size - 1])
    a, g, b = np.zeros((OUTPUTS, size)), np.zeros((size, taps)), np.zeros((size, size))
    for i, point in enumerate(points):
        others = np.delete(points, i)
        a[:, i] = point ** np.arange(OUTPUTS)
        g[i] = point ** np.arange(taps) / np.prod(point - others)
        b[i, :-1] = np.poly(others)[::-1]
    a[-1, -1] = g[-1, -1] = 1  # infinity
    b[-1] = np.poly(points)[::-1]
    return a, g, b


class WinogradGraph(EncoderGraph):
    """Nodes in the order in which they run. Methods take and give the names of values."""

    def convolutions(self) -> str:
        """Both, (B, I * G, rows, columns); as in `graphs.py` of filters that need more points."""
        if self.config.kernel_size > PHASES * TAPS:
            return super().convolutions()
        few, many = self.by_size("images", DIRECT)
        both = self.second_convolution(self.features(few)), self.products(self.features(many))
        return self.op("Concat", *both, axis=0)

    def route(self, u: str) -> str:
        """As on bytes: few images store u_hat."""
        return self.route_by_size(u)

    def weight_at_points(self) -> str:
        """G w of the second convolution in both directions, (S * S, I * G, P * P * C).

        One product makes it of the stored filters, because every step until then is in memory while a runtime
        folds them.
        """
        config, kernel = self.config, self.config.kernel_size
        _, g, _ = self.matrices_a_g_b()
        # Of each phase every other tap: (S, P, kernel).
        spread = np.zeros((len(g), PHASES, kernel))
        for phase in range(PHASES):
            taps = len(range(phase, kernel, PHASES))
            spread[:, phase, phase::PHASES] = g[:, :taps]
        both = np.einsum("xir,yjc->xyijrc", spread, spread) * float(self.votes)
        both = both.reshape(len(g) ** 2, 1, 1, PHASES**2, kernel**2)
        groups, dimensions, channels = config.primary_groups, config.primary_dimensions, config.conv_channels
        weight = self.weight(f"{PRIMARY}.weight", TensorProto.FLOAT16)
        weight = self.op("Reshape", weight, self.axes(groups, dimensions, channels, kernel**2))
        weight = self.op("Transpose", weight, perm=[1, 0, 3, 2])
        weight = self.op("Cast", weight, to=TensorProto.FLOAT)
        weight = self.op("MatMul", self.constant(both.astype(np.float32), "at_points"), weight)
        return self.op("Reshape", weight, self.axes(len(g) ** 2, groups * dimensions, PHASES**2 * channels))

    def matrices_a_g_b(self) -> tuple[Matrix, Matrix, Matrix]:
        """The transforms for as many taps as a phase of a filter has."""
        return transforms(-(-self.config.kernel_size // PHASES))

    def products(self, features: str) -> str:
        """The second convolution, (B, I * G, rows, columns)."""
        config = self.config
        a, _, b = self.matrices_a_g_b()
        size, channels = len(b), config.conv_channels
        outputs = config.primary_groups * config.primary_dimensions
        sides = [length - config.kernel_size + 1 for length in (config.height, config.width)]
        tiles = [-(-length // OUTPUTS) for length in config.grid]

        x = self.op("Transpose", features, perm=[0, 2, 3, 1])
        x = self.op("Reshape", x, self.axes(-1, sides[0], sides[1] * channels))
        x = self.op("MatMul", self.for_each_image(x, _spread(b, sides[0], tiles[0])), x)
        x = self.op("Reshape", x, self.axes(-1, PHASES * tiles[0] * size, sides[1], channels))
        x = self.op("MatMul", self.for_each_image(x, _spread(b, sides[1], tiles[1])[None]), x)
        x = self.by_point(x, tiles, size)
        # The weights on the left: what is on the right is copied on the way, and of few images is smaller.
        x = self.op("MatMul", self.weight_at_points(), self.op("Transpose", x, perm=[0, 2, 1]))

        x = self.op("Reshape", x, self.axes(size**2, -1))
        back = np.einsum("ix,jy->ijxy", a, a).reshape(OUTPUTS**2, -1).astype(np.float32)
        x = self.op("MatMul", self.constant(back, "outputs"), x)
        x = self.op("Reshape", x, self.axes(OUTPUTS, OUTPUTS, outputs, -1, *tiles))
        x = self.op("Transpose", x, perm=[3, 2, 4, 0, 5, 1])  # (B, O, T, 3, T, 3)
        x = self.op("Reshape", x, self.axes(-1, outputs, *(OUTPUTS * count for count in tiles)))
        if config.grid != tuple(OUTPUTS * count for count in tiles):
            x = self.op("Slice", x, self.axes(0, 0), self.axes(*config.grid), self.axes(2, 3))
        bias = self.by_dimension(self.weight(f"{PRIMARY}.bias"))
        return self.op("Add", x, self.op("Reshape", bias, self.axes(-1, 1, 1)))

    def by_point(self, x: str, tiles: list[int], size: int) -> str:
        """(B, P * T * S, P * T * S, C) -> (S * S, B * T * T, P * P * C).

        Gathered, since ONNX Runtime transposes on one thread alone.
        """
        channels = self.config.conv_channels
        rows, columns = (PHASES * count * size for count in tiles)
        places = np.arange(rows * columns).reshape(PHASES, tiles[0], size, PHASES, tiles[1], size)
        places = places.transpose(2, 5, 1, 4, 0, 3).reshape(size**2, 1, -1)  # (S, S, T, T, P, P) of an image
        count = self.op("Squeeze", self.op("Shape", x, start=0, end=1), self.axes(0))
        images = self.op("Range", self.constant(np.int64(0)), count, self.constant(np.int64(1)))
        images = self.op("Reshape", images, self.axes(1, -1, 1))
        first = self.op("Mul", images, self.constant(np.int64(rows * columns)))
        x = self.op("Reshape", x, self.axes(-1, channels))
        x = self.op("Gather", x, self.op("Add", self.constant(places), first), axis=0)
        return self.op("Reshape", x, self.axes(size**2, -1, PHASES**2 * channels))

    def for_each_image(self, values: str, matrix: NDArray[np.float32]) -> str:
        """A matrix as often as there are images: of none, ONNX Runtime takes no product with a single one."""
        images = self.op("Shape", values, start=0, end=1)
        shape = self.op("Concat", images, self.axes(*[1] * matrix.ndim), axis=0)
        return self.op("Expand", self.constant(matrix), shape)


def _spread(b: Matrix, side: int, tiles: int) -> NDArray[np.float32]:
    """B on every phase and tile of an axis at once, (P * T * S, side); beyond the side there are zeros."""
    size = len(b)
    spread = np.zeros((PHASES, tiles, size, PHASES * (OUTPUTS * tiles + size)))
    for phase in range(PHASES):
        for tile in range(tiles):
            begin = PHASES * OUTPUTS * tile + phase
            spread[phase, tile, :, begin : begin + PHASES * size : PHASES] = b
    return spread[..., :side].reshape(-1, side).astype(np.float32)
