"""The fp32 encoder with its second convolution as 4 phases of 5x5 and Winograd's F(3, 5).

The same mathematics with a quarter of the multiplications, but weights two and a half times as large. Not
exported; decision 20 says why.

A convolution of stride 2 is the sum of four of stride 1, each on every other row and column. For three
outputs in a row, each of five taps, F(3, 5) multiplies at seven points: y = A ((G w) * (B x)). In two
dimensions that is 49 matrix products over channels and phases at once. Source: Lavin and Gray, "Fast
Algorithms for Convolutional Neural Networks", 2015; the matrices are Toom and Cook's, from the points below
and infinity.

The letters: B images, C channels in, O out, P phases of an axis (2), T tiles of an axis, S points (7).
"""

import numpy as np
import onnx
from numpy.typing import NDArray

from training.graphs import PRIMARY, EncoderGraph
from training.model import CapsNet

Matrix = NDArray[np.float64]

OUTPUTS, TAPS, PHASES = 3, 5, 2
POINTS = (0.0, 1.0, -1.0, 0.5, -0.5, 2.0)


def transforms() -> tuple[Matrix, Matrix, Matrix]:
    """A (3, S), G (S, 5) and B (S, S) of y = A ((G w) * (B x)) for y_j = sum of w_k x_(j + k)."""
    points = np.array(POINTS)
    size = OUTPUTS + TAPS - 1
    a, g, b = np.zeros((OUTPUTS, size)), np.zeros((size, TAPS)), np.zeros((size, size))
    for i, point in enumerate(points):
        others = np.delete(points, i)
        a[:, i] = point ** np.arange(OUTPUTS)
        g[i] = point ** np.arange(TAPS) / np.prod(point - others)
        b[i, :-1] = np.poly(others)[::-1]
    a[-1, -1] = g[-1, -1] = 1  # infinity
    b[-1] = np.poly(points)[::-1]
    return a, g, b


def winograd_encoder(network: CapsNet) -> onnx.ModelProto:
    """The graph `images` -> `digit_capsules`, `capsule_lengths`, for grids whose side is a multiple of 3."""
    graph = EncoderGraph(network)
    graph.finish(graph.route(graph.primary_capsules(_convolutions(graph))))
    return graph.model()


def _convolutions(graph: EncoderGraph) -> str:
    """Both, (B, O, rows, columns)."""
    config = graph.config
    channels, kernel = config.conv_channels, config.kernel_size
    sides = [size - kernel + 1 for size in (config.height, config.width)]  # behind the first
    tiles = [((side - kernel) // PHASES + 1) // OUTPUTS for side in sides]
    order = np.arange(config.primary_groups * config.primary_dimensions)
    order = order.reshape(config.primary_groups, -1).T.reshape(-1)  # dimension by dimension
    a, g, b = transforms()
    size, outputs = len(b), len(order)

    x = graph.op("Transpose", graph.features(), perm=[0, 2, 3, 1])
    x = graph.op("Reshape", x, graph.axes(-1, sides[0], sides[1] * channels))
    rows, columns = (
        graph.constant(_spread(b, side, count)) for side, count in zip(sides, tiles, strict=True)
    )
    x = graph.op("MatMul", rows, x)
    x = graph.op("Reshape", x, graph.axes(-1, sides[1], channels))
    x = graph.op("MatMul", columns, x)
    x = graph.op("Reshape", x, graph.axes(-1, PHASES, tiles[0], size, PHASES, tiles[1], size, channels))
    x = graph.op("Transpose", x, perm=[3, 6, 0, 2, 5, 1, 4, 7])  # (S, S, B, T, T, P, P, C)
    x = graph.op("Reshape", x, graph.axes(size**2, -1, PHASES**2 * channels))

    weight = graph.weights[f"{PRIMARY}.weight"][order].astype(np.float64) * float(graph.votes)
    phases = np.zeros((outputs, channels, PHASES, PHASES, TAPS, TAPS))
    for i in range(PHASES):
        for j in range(PHASES):
            taps = weight[:, :, i::PHASES, j::PHASES]
            phases[:, :, i, j, : taps.shape[2], : taps.shape[3]] = taps
    points = np.einsum("xk,yl,ocpqkl->xypqco", g, g, phases, optimize=True).reshape(size**2, -1, outputs)
    x = graph.op("MatMul", x, graph.constant(points.astype(np.float32)))

    x = graph.op("Reshape", x, graph.axes(size**2, -1))
    back = np.einsum("ix,jy->ijxy", a, a).reshape(OUTPUTS**2, -1).astype(np.float32)
    x = graph.op("MatMul", graph.constant(back), x)
    x = graph.op("Reshape", x, graph.axes(OUTPUTS, OUTPUTS, -1, *tiles, outputs))
    x = graph.op("Transpose", x, perm=[2, 5, 3, 0, 4, 1])  # (B, O, T, 3, T, 3)
    x = graph.op("Reshape", x, graph.axes(-1, outputs, OUTPUTS * tiles[0], OUTPUTS * tiles[1]))
    bias = graph.weights[f"{PRIMARY}.bias"][order]
    return graph.op("Add", x, graph.constant(bias[:, None, None].astype(np.float32)))


def _spread(b: Matrix, side: int, tiles: int) -> NDArray[np.float32]:
    """B on every phase and tile of an axis at once, (P * T * S, side)."""
    spread = np.zeros((PHASES, tiles, len(b), side))
    for phase in range(PHASES):
        for tile in range(tiles):
            for i in range(len(b)):
                place = PHASES * (OUTPUTS * tile + i) + phase
                if place < side:
                    spread[phase, tile, :, place] = b[:, i]
    return spread.reshape(-1, side).astype(np.float32)
