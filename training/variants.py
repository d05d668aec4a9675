"""The encoder in other forms: written beside the fp32 one, and compared with it on the test images.

One in fp32 and one in 8 bits are for CPUs; one in half precision is for GPUs, and draws the longest capsule.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from service.manifest import Graph, Variant
from training.data import Dataset
from training.gpu_graph import predictor_graph
from training.graphs import encoder_graph, largest_feature, save_sharing
from training.losses import mistaken, named
from training.model import CapsNet
from training.predictor import Floats, Images, OnnxPredictor, open_graph, run_encoder
from training.rounded import RoundedGraph
from training.winograd import WinogradGraph

BATCH = 32
LARGEST_FOR_WINOGRAD = 40 * 40
"""Pixels of an image that Winograd's algorithm convolves. At 64x48 it gains nothing in batches of 32 and
takes four times the memory, 1.8 GiB in all; sizes between were not measured."""
BEST_PSNR = 200.0
"""dB of equal images, whose true value is infinite; more than single precision can tell apart."""


def write_variants(network: CapsNet, images: Tensor, encoder: Path, decoder: Path) -> dict[str, Path]:
    """Write the variants beside the file `encoder`; their paths by precision.

    Args:
        images: training images, from which the 8-bit one takes its range.
        decoder: beside `encoder` too.
    """
    graphs = {
        "fp16": ("fp16", predictor_graph(network)),
        "int8": ("int8", encoder_graph(network, largest_feature(network, images))),
    }
    if network.config.height * network.config.width <= LARGEST_FOR_WINOGRAD:
        graphs = {"fp32": ("winograd", encoder_graph(network, writer=WinogradGraph)), **graphs}
    files = {precision: encoder.with_name(f"encoder.{name}.onnx") for precision, (name, _) in graphs.items()}
    for precision, (_, graph) in graphs.items():
        save_sharing(graph, files[precision], encoder, decoder)
        onnx.checker.check_model(files[precision], full_check=True)
    return files


def measure_variants(
    graphs: Mapping[str, Graph], fp32: OnnxPredictor, dataset: Dataset
) -> tuple[Variant, ...]:
    """Mistakes, agreement and PSNR of the encoders `graphs` in the folder of `fp32`, on all of `dataset`."""
    encoders = {
        precision: _encoder(precision, fp32.folder / graph.file) for precision, graph in graphs.items()
    }
    mistakes = dict.fromkeys(graphs, 0)
    agreed = dict.fromkeys(graphs, 0)
    squares = dict.fromkeys(graphs, 0.0)
    step = images_at_a_time(*dataset.images.shape[1:3])
    for start in range(0, len(dataset), step):
        images = dataset.images[start : start + step].cpu().numpy()
        labels = dataset.labels[start : start + step].cpu()
        capsules, lengths = fp32.encode(images)
        expected = named(torch.from_numpy(lengths), labels)
        drawn = fp32.decode(capsules, lengths.argmax(axis=1))
        for precision, encode in encoders.items():
            capsules, lengths, *redrawn = encode(images)
            found = named(torch.from_numpy(lengths), labels)
            broken = ~torch.from_numpy(lengths).isfinite().all(dim=1)
            mistakes[precision] += int((mistaken(found, labels) | broken).sum())
            agreed[precision] += len(found) - int((mistaken(found, expected) | broken).sum())
            (again,) = redrawn or [fp32.decode(capsules, lengths.argmax(axis=1))]
            squares[precision] += _squares(again, drawn)
    pixels = dataset.images.numel()
    return tuple(
        Variant.model_validate(
            {
                "precision": precision,
                "encoder": graph,
                "test_mistakes": mistakes[precision],
                "agreement": 100 * agreed[precision] / len(dataset),
                "psnr": psnr(squares[precision] / pixels),
            }
        )
        for precision, graph in graphs.items()
    )


def images_at_a_time(height: int, width: int) -> int:
    """Images to be measured at a time, in the memory of 32 of 28x28; a lone one would go another way."""
    return max(2, min(BATCH, BATCH * 28 * 28 // (height * width)))


def _encoder(precision: str, path: Path) -> Callable[[Images], tuple[Floats, ...]]:
    """As it computes, and draws if it does, where it is served: what is in half precision on a GPU."""
    if precision == "fp16":
        return RoundedGraph(path).predict
    return partial(run_encoder, open_graph(path))


def _squares(found: Floats, expected: Floats) -> float:
    return float(np.square(found - expected, dtype=np.float64).sum())


def psnr(mean_square: float) -> float:
    """Peak signal to noise ratio in dB, of pixels in [0, 1]."""
    if not np.isfinite(mean_square):
        return 0.0
    return BEST_PSNR if mean_square <= 0 else min(BEST_PSNR, float(-10 * np.log10(mean_square)))
