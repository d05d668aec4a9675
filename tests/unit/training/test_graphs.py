from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper

from training.config import ModelConfig
from training.export import round_to_half, write_decoder
from training.gpu_graph import fits_half, predictor_graph
from training.graphs import (
    FEW,
    LARGE,
    ROWS,
    EncoderGraph,
    encoder_graph,
    largest_feature,
    save_sharing,
    softmax_fits,
)
from training.model import CapsNet, as_channels, length
from training.rounded import RoundedGraph
from training.winograd import WinogradGraph

NUMBER_OF_IMAGES = 5


@pytest.fixture
def images(model_config: ModelConfig) -> torch.Tensor:
    shape = (NUMBER_OF_IMAGES, model_config.height, model_config.width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def written(network: CapsNet, images: torch.Tensor, precision: str) -> onnx.ModelProto:
    """The encoder's graph in any precision."""
    if precision == "fp16":
        return predictor_graph(network)
    if precision == "int8":
        return encoder_graph(network, largest_feature(network, images))
    return encoder_graph(network)


def run(path: Path, images: torch.Tensor, precision: str = "fp32") -> tuple[np.ndarray, np.ndarray]:
    """By ONNX Runtime; in half precision as a GPU rounds, which it does not on a CPU."""
    if precision == "fp16":
        capsules, lengths, _ = RoundedGraph(path).predict(images.numpy())
        return capsules, lengths
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    capsules, lengths = session.run(["digit_capsules", "capsule_lengths"], {"images": images.numpy()})
    return capsules, lengths


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-6), ("fp16", 2e-3)])
@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_graph_is_the_network(
    model_config: ModelConfig,
    images: torch.Tensor,
    tmp_path: Path,
    precision: str,
    tolerance: float,
    iterations: int,
    shared: bool,
    channels: int,
) -> None:
    """The operators written for speed give the network's capsules, to seven digits; in fp16 to three."""
    torch.manual_seed(1)
    network = CapsNet(
        replace(model_config, routing_iterations=iterations, shared_weights=shared, channels=channels)
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)  # and logits far from zero
    round_to_half(network)
    if channels == 3:
        images = torch.stack([images, images // 2, 255 - images], dim=-1)
    assert fits_half(network) is not shared
    model = written(network, images, precision)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, tmp_path / "encoder.onnx")
    for size in (1, NUMBER_OF_IMAGES):
        capsules, lengths = run(tmp_path / "encoder.onnx", images[:size], precision)
        expected = network.encoder(images[:size]).detach()
        np.testing.assert_allclose(capsules, expected.numpy(), atol=tolerance)
        np.testing.assert_allclose(lengths, length(expected).numpy(), atol=tolerance)
        assert precision == "fp32" or np.abs(capsules - expected.numpy()).max() > 0


@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
@pytest.mark.parametrize("biases", [False, True])
def test_both_routings_are_the_networks(
    model_config: ModelConfig, images: torch.Tensor, tmp_path: Path, iterations: int, biases: bool
) -> None:
    """Up to `FEW` images u_hat is stored, beyond it is not, and nobody could tell."""
    torch.manual_seed(1)
    network = CapsNet(replace(model_config, routing_iterations=iterations, capsule_biases=biases))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    round_to_half(network)
    graph = EncoderGraph(network)
    graph.finish(graph.route_by_size(graph.primary_capsules(graph.convolutions())))
    onnx.checker.check_model(graph.model(), full_check=True)
    onnx.save(graph.model(), tmp_path / "encoder.onnx")
    assert FEW < NUMBER_OF_IMAGES, "one of them would never run"
    for size in range(1, NUMBER_OF_IMAGES + 1):
        expected = network.encoder(images[:size]).detach()
        np.testing.assert_allclose(run(tmp_path / "encoder.onnx", images[:size])[0], expected, atol=2e-6)


@pytest.mark.parametrize("form", ["int8", "winograd"])
@pytest.mark.parametrize(("size", "stored"), [(1, True), (FEW, True), (FEW + 1, False)])
def test_each_routing_gets_its_batches(
    model_config: ModelConfig, images: torch.Tensor, tmp_path: Path, size: int, stored: bool, form: str
) -> None:
    """The graphs for CPUs store u_hat of up to `FEW` images, and of none where there are more."""
    network = CapsNet(model_config)
    if form == "winograd":
        model = encoder_graph(network, writer=WinogradGraph)
    else:
        model = written(network, images, form)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.value_info
    count = model_config.primary_count
    (u_hat,) = (
        value
        for value in inferred
        if [axis.dim_value for axis in value.type.tensor_type.shape.dim][0::2]
        == [count, len(model_config.classes) * model_config.digit_dimensions]
        and value.name.startswith("MatMul")
    )
    model.graph.output.append(u_hat)
    onnx.save(model, tmp_path / "encoder.onnx")
    session = ort.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run([u_hat.name], {"images": images[:size].numpy()})
    assert found.shape[1] == (size if stored else 0)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_what_cannot_be_captured(model_config: ModelConfig, images: torch.Tensor, precision: str) -> None:
    """No graph has branches, which CUDA graphs cannot have; those for GPUs are alike for every batch."""
    kinds = {node.op_type for node in written(CapsNet(model_config), images, precision).graph.node}
    assert "If" not in kinds
    assert ("Where" in kinds) is (precision == "int8")


def test_shared_matrices_have_one_routing(model_config: ModelConfig, images: torch.Tensor) -> None:
    """u_hat is never stored where a group's capsules share their matrices."""
    shared = CapsNet(replace(model_config, shared_weights=True))
    assert "Where" not in {node.op_type for node in written(shared, images, "int8").graph.node}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_authors_switches(
    model_config: ModelConfig, images: torch.Tensor, tmp_path: Path, precision: str
) -> None:
    """Biases of the digit capsules and votes divided by the number of groups are in the graph as well."""
    torch.manual_seed(1)
    network = CapsNet(replace(model_config, capsule_biases=True, scaled_votes=True))
    round_to_half(network)
    onnx.save(written(network, images, precision), tmp_path / "encoder.onnx")
    capsules, _ = run(tmp_path / "encoder.onnx", images, precision)
    tolerance = {"fp32": 2e-6, "fp16": 2e-3, "int8": 2e-2}[precision]
    np.testing.assert_allclose(capsules, network.encoder(images).detach().numpy(), atol=tolerance)


def test_logits_beyond_what_exp_can_take(
    model_config: ModelConfig, images: torch.Tensor, tmp_path: Path
) -> None:
    """Agreements of several hundred, whose exponential overflows, still give numbers, and the right ones."""
    torch.manual_seed(1)
    network = CapsNet(model_config)
    with torch.no_grad():
        for parameter in network.encoder.parameters():
            parameter.mul_(3)
        network.encoder.digit_capsules.weight.mul_(300)
    round_to_half(network)
    u = network.encoder.primary_capsules(torch.relu(network.encoder.conv(images.unsqueeze(1) / 255)))
    layer = network.encoder.digit_capsules
    grouped = u.unflatten(1, (layer.num_groups, -1))
    v = torch.nn.functional.normalize(layer.uniform_sum(grouped), dim=-1)
    assert layer.agreement(grouped, v).max() > 100, "these weights do not reach where exp overflows"
    expected = network.encoder(images).detach().numpy()
    for precision, tolerance in (("fp32", 1e-3), ("fp16", 2e-2)):
        onnx.save(written(network, images, precision), tmp_path / "encoder.onnx")
        found, _ = run(tmp_path / "encoder.onnx", images, precision)
        np.testing.assert_allclose(found, expected, atol=tolerance)


@pytest.mark.parametrize("shared", [False, True])
def test_the_second_convolution_is_in_half_precision(model_config: ModelConfig, shared: bool) -> None:
    """For a GPU, whose tensor cores are for that; where the routing is as on a CPU, too."""
    model = predictor_graph(CapsNet(replace(model_config, shared_weights=shared)))
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.value_info
    types = {value.name: value.type.tensor_type.elem_type for value in inferred}
    (convolution,) = (node for node in model.graph.node if node.op_type == "Conv")
    assert types[convolution.output[0]] == onnx.TensorProto.FLOAT16


def test_capsules_that_make_no_whole_rows(model_config: ModelConfig, tmp_path: Path) -> None:
    """27 capsules, of which neither 16 nor 2 divide the number, are summed up one by one."""
    torch.manual_seed(1)
    config = replace(model_config, primary_groups=3, height=14, width=14)
    assert config.primary_count == 27
    network = CapsNet(config)
    round_to_half(network)
    images = torch.randint(0, 256, (NUMBER_OF_IMAGES, 14, 14), dtype=torch.uint8)
    onnx.save(predictor_graph(network), tmp_path / "predictor.onnx")
    capsules, _ = run(tmp_path / "predictor.onnx", images, "fp16")
    np.testing.assert_allclose(capsules, network.encoder(images).detach().numpy(), atol=2e-3)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_graph_for_gpus_draws(
    model_config: ModelConfig, images: torch.Tensor, tmp_path: Path, channels: int
) -> None:
    """Its third output is the decoder's, of the longest capsule of each image."""
    torch.manual_seed(1)
    network = CapsNet(replace(model_config, channels=channels))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)  # or no capsule would be long enough to be seen
    round_to_half(network)
    assert fits_half(network)
    if channels == 3:
        images = torch.stack([images, images.flip(0), 255 - images], dim=-1)
    onnx.save(predictor_graph(network), tmp_path / "predictor.onnx")
    capsules, lengths, drawn = RoundedGraph(tmp_path / "predictor.onnx").predict(images.numpy())
    longest = torch.from_numpy(lengths.argmax(axis=1))
    expected = network.decoder(torch.from_numpy(capsules), longest).detach().numpy()
    assert drawn.shape == images.shape
    np.testing.assert_allclose(drawn, expected, atol=2e-3)
    others = network.decoder(torch.from_numpy(capsules), (longest + 1) % len(model_config.classes))
    assert np.abs(drawn - others.detach().numpy()).max() > 2e-3, "any capsule would have been drawn like this"


def test_of_equally_long_capsules_the_first_is_drawn(model_config: ModelConfig, tmp_path: Path) -> None:
    """As the service names the first of them."""
    torch.manual_seed(1)
    network = CapsNet(model_config)
    round_to_half(network)
    whole, end = tmp_path / "predictor.onnx", tmp_path / "end.onnx"
    onnx.save(predictor_graph(network), whole)
    onnx.utils.extract_model(whole, end, ["digit_capsules", "capsule_lengths"], ["reconstructions"])
    session = ort.InferenceSession(end, providers=["CPUExecutionProvider"])
    capsules = torch.randn(3, len(model_config.classes), model_config.digit_dimensions)
    lengths = np.array([[0.2, 0.7, 0.7], [0.5, 0.5, 0.5], [0.1, 0.2, 0.3]], np.float32)
    inputs = {"digit_capsules": capsules.numpy(), "capsule_lengths": lengths}
    (drawn,) = session.run(None, inputs)
    expected = network.decoder(capsules, torch.tensor([1, 0, 2])).detach().numpy()
    np.testing.assert_allclose(drawn, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("norm", "in_half", "in_single"), [(2.5, True, True), (20, False, True), (50, False, False)]
)
def test_what_a_precision_could_not_hold(
    model_config: ModelConfig, images: torch.Tensor, norm: float, in_half: bool, in_single: bool
) -> None:
    """Too large logits for half precision are raised in single; too large for that, one is subtracted."""
    network = CapsNet(model_config)
    weight = network.encoder.digit_capsules.weight
    with torch.no_grad():
        weight.mul_(0.1 / torch.linalg.matrix_norm(weight, ord=2).max())
        weight[1, 0] *= norm / torch.linalg.matrix_norm(weight[1, 0], ord=2)
    assert fits_half(network) is in_half
    for precision in ("fp32", "fp16", "int8"):
        model = written(network, images, precision)
        assert ("ReduceMax" not in {node.op_type for node in model.graph.node}) is in_single
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.value_info
        types = {value.name: value.type.tensor_type.elem_type for value in inferred}
        raised = {types[node.output[0]] for node in model.graph.node if node.op_type == "Exp"}
        half = precision == "fp16" and in_half
        assert raised == {onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT}


def test_iterations_add_up_in_the_logits(model_config: ModelConfig) -> None:
    """With an iteration more the same matrices may bring a logit out of range, which here is 5.3."""
    for iterations, fits in ((1, True), (2, True), (3, False)):
        network = CapsNet(replace(model_config, routing_iterations=iterations))
        weight = network.encoder.digit_capsules.weight
        with torch.no_grad():
            weight.mul_(3 / torch.linalg.matrix_norm(weight, ord=2).max())
        assert softmax_fits(network, 200 * len(model_config.classes)) is fits


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 2e-3), ("int8", 2e-2)])
@pytest.mark.parametrize("channels", [1, 3])
def test_variants_are_close(
    model_config: ModelConfig,
    images: torch.Tensor,
    tmp_path: Path,
    precision: str,
    tolerance: float,
    channels: int,
) -> None:
    """Fewer bits move the capsules a little, and not at all would mean that they were not used."""
    torch.manual_seed(1)
    network = CapsNet(replace(model_config, channels=channels))
    if channels == 3:
        images = torch.stack([images, images // 2, 255 - images], dim=-1)
    onnx.save(written(network, images, precision), tmp_path / "encoder.onnx")
    capsules, _ = run(tmp_path / "encoder.onnx", images, precision)
    difference = np.abs(capsules - network.encoder(images).detach().numpy())
    assert 0 < difference.max() < tolerance


def test_no_pair_of_8_bit_products_overflows(model_config: ModelConfig, images: torch.Tensor) -> None:
    """Any two products of a byte and a weight sum up within 16 bits, as some processors sum them."""
    network = CapsNet(model_config)
    graph = encoder_graph(network, largest_feature(network, images)).graph
    place = {"QLinearConv": 3, "MatMulInteger": 1}
    convolutions = {node.input[place[node.op_type]] for node in graph.node if node.op_type in place}
    weights = [numpy_helper.to_array(each) for each in graph.initializer if each.name in convolutions]
    assert len(weights) == 1 + -(-model_config.kernel_size // ROWS)
    for weight in weights:
        largest = int(np.abs(weight.astype(np.int32)).max())
        assert largest > 60
        assert 2 * 255 * largest < 2**15


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_8_bit_graph_by_hand(
    model_config: ModelConfig, images: torch.Tensor, tmp_path: Path, channels: int, scaled: bool
) -> None:
    """It is the network with weights of 64 steps to either side and features of 255; the rest is exact."""
    torch.manual_seed(1)
    config = replace(model_config, width=model_config.width + 3, channels=channels, scaled_votes=scaled)
    network = CapsNet(config)
    images = torch.cat([images, images.flip(1)], dim=2)[:, :, : config.width]
    if channels == 3:
        images = torch.stack([images, images // 2, 255 - images], dim=-1)
    largest = largest_feature(network, images)
    onnx.save(encoder_graph(network, largest), tmp_path / "encoder.onnx")
    first, second = network.encoder.conv, network.encoder.primary_capsules.conv
    with torch.no_grad():
        for conv in (first, second):
            step = conv.weight.abs().amax(dim=(1, 2, 3), keepdim=True) / 64
            conv.weight.copy_(step * (conv.weight / step).round())
        features = torch.nn.functional.relu(first(as_channels(images)))
        features = (features * 255 / largest).round() * (largest / 255)
        u = network.encoder.primary_capsules(features)
        expected = network.encoder.digit_capsules(u)
    for size in (1, NUMBER_OF_IMAGES):
        capsules, _ = run(tmp_path / "encoder.onnx", images[:size])
        np.testing.assert_allclose(capsules, expected[:size], atol=1e-4)


@pytest.mark.parametrize("largest", [0.0, 1e-6, 1e-4])
def test_filters_of_nothing_in_8_bits(
    model_config: ModelConfig, images: torch.Tensor, tmp_path: Path, largest: float
) -> None:
    """A filter whose weights are as good as zero gives its bias, however many of its steps that would be."""
    torch.manual_seed(1)
    network = CapsNet(model_config)
    with torch.no_grad():
        for conv in (network.encoder.conv, network.encoder.primary_capsules.conv):
            conv.weight[:4] *= largest / conv.weight.abs().max()
            conv.get_parameter("bias")[:4] = 0.5
    onnx.save(encoder_graph(network, largest_feature(network, images)), tmp_path / "encoder.onnx")
    capsules, _ = run(tmp_path / "encoder.onnx", images)
    np.testing.assert_allclose(capsules, network.encoder(images).detach(), atol=1e-3)


def test_the_largest_feature_by_hand(model_config: ModelConfig) -> None:
    """It is that of all images, the 65th included, and of nothing but zeros not zero."""
    network = CapsNet(model_config)
    conv = network.encoder.conv
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.zero_()
        conv.weight[0, 0, 0, 0] = 3
        conv.weight[1, 0, 0, 0] = -4
    images = torch.zeros(65, *model_config.image_shape, dtype=torch.uint8)
    for brightest in (0, 64):
        images.zero_()[brightest] = 255
        assert largest_feature(network, images) == 3
    assert largest_feature(network, images.zero_()) == 1e-6


def test_weights_are_read_from_the_other_file(
    model_config: ModelConfig, images: torch.Tensor, tmp_path: Path
) -> None:
    """The fp16 graph stores no half-precision weight that the fp32 files have, and reads it from there; what
    a runtime takes as it is stays with it."""
    network = CapsNet(model_config)
    names = ("whole", "shared", "encoder", "decoder")
    whole, shared, encoder, decoder = (tmp_path / f"{name}.onnx" for name in names)
    onnx.save(encoder_graph(network), encoder)
    write_decoder(network, decoder)
    onnx.save(predictor_graph(network), whole)
    save_sharing(predictor_graph(network), shared, encoder, decoder)
    stored = onnx.load(shared, load_external_data=False).graph.initializer
    entries = [entry for tensor in stored for entry in tensor.external_data]
    assert {entry.value for entry in entries if entry.key == "location"} == {"encoder.onnx", "decoder.onnx"}
    held = encoder.read_bytes() + decoder.read_bytes()
    for tensor in stored:
        half = tensor.data_type == onnx.TensorProto.FLOAT16
        external = tensor.data_location == onnx.TensorProto.EXTERNAL
        assert half or not external
        assert external or not half or len(tensor.raw_data) < LARGE or tensor.raw_data not in held
    answers = (RoundedGraph(path).predict(images.numpy()) for path in (shared, whole))
    for found, expected in zip(*answers, strict=True):
        np.testing.assert_array_equal(found, expected)
