"""Half precision on a CPU, rounded as a GPU rounds."""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference.op_run import OpRun

from training.config import ModelConfig
from training.gpu_graph import predictor_graph
from training.model import CapsNet
from training.rounded import Conv, MatMul, RoundedGraph, Values, read


def test_tf32_keeps_ten_bits() -> None:
    """What lies between two numbers of 10 bits becomes the nearer one; zero, signs and sizes stay."""
    values = torch.tensor([0.0, 1.0, 1 + 2**-10, 1 + 2**-12, -(1 + 3 * 2**-12), 3e38, -1e-30])
    expected = torch.tensor([0.0, 1.0, 1 + 2**-10, 1.0, -(1 + 2**-10), 3e38, -1e-30])
    torch.testing.assert_close(read(values), expected, rtol=2**-11, atol=0)
    assert torch.equal(read(values)[:5], expected[:5])
    half = torch.tensor([1 + 2**-10], dtype=torch.float16)
    assert torch.equal(read(half), half.float())


def test_every_operator_rounds(tmp_path: Path) -> None:
    """2048 + 1 + 1 in half precision is 2048; rounded at the end alone it is 2050."""
    names = ("digit_capsules", "capsule_lengths")
    one = numpy_helper.from_array(np.array([[1]], np.float16), "one")
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT16),
        helper.make_node("Add", ["x", "one"], ["more"]),
        helper.make_node("Add", ["more", "one"], ["most"]),
        *(helper.make_node("Cast", ["most"], [name], to=TensorProto.FLOAT) for name in names),
    ]
    graph = helper.make_graph(
        nodes,
        "sum",
        [helper.make_tensor_value_info("images", TensorProto.INT64, ["batch", 1])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1]) for name in names],
        [one],
    )
    path = tmp_path / "sum.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    assert RoundedGraph(path).predict(np.array([[2048]]))[0] == [[2048]]


def by(operator: type[OpRun], *inputs: Values) -> Values:
    result: Values = operator.eval(*inputs)  # type: ignore[arg-type] # its types say lists
    return result


def test_products_by_hand() -> None:
    """Products sum up in single precision and round once; those of single precision read 10 bits of each."""
    half = np.array([[2048, 1]], np.float16)
    ones = np.ones((2, 1), np.float16)
    image, kernel = half.reshape(1, 1, 1, 2), ones.reshape(1, 1, 1, 2)
    product, convolved = by(MatMul, half, ones), by(Conv, image, kernel, np.zeros(1, np.float16))
    assert product.dtype == convolved.dtype == np.float16
    assert product.item() == convolved.item() == 2048  # 2049, rounded
    finer, large = np.array([[1 + 2**-12]], np.float32), np.array([[2048]], np.float32)
    finest = np.array([1 + 2**-12], np.float32)
    for a, b in ((finer, large), (large, finer)):
        assert by(MatMul, a, b).item() == 2048
        dot, factor = a.reshape(1, 1, 1, 1), b.reshape(1, 1, 1, 1)
        assert by(Conv, dot, factor, np.zeros(1, np.float32)).item() == 2048
    assert by(Conv, 0 * dot, factor, finest).item() == finest, "a bias is added as it is"


def test_an_encoder_by_half_precision(model_config: ModelConfig, tmp_path: Path) -> None:
    """It is farther from the network than single precision would be, and not far."""
    torch.manual_seed(0)
    network = CapsNet(model_config)
    onnx.save(predictor_graph(network), tmp_path / "encoder.onnx")
    images = torch.randint(0, 256, (7, *model_config.image_shape), dtype=torch.uint8)
    expected = network.encoder(images).detach().numpy()
    capsules, lengths, _ = RoundedGraph(tmp_path / "encoder.onnx").predict(images.numpy())
    assert capsules.dtype == lengths.dtype == np.float32
    assert 1e-5 < np.abs(capsules - expected).max() < 2e-3
    np.testing.assert_allclose(lengths, np.linalg.norm(capsules, axis=-1), atol=1e-3)
