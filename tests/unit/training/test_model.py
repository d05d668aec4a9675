from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.config import ModelConfig
from training.model import (
    CapsNet,
    CapsuleLayer,
    PrimaryCapsules,
    for_all_classes,
    length,
    mask,
    squash,
    sum_of_pieces,
)

DIGITS = tuple("0123456789")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_squash_by_hand() -> None:
    """A vector of length 3 keeps its direction and gets length 9/10."""
    torch.testing.assert_close(squash(torch.tensor([[0.0, 3.0, 0.0]])), torch.tensor([[0.0, 0.9, 0.0]]))


def test_squash_shrinks_short_vectors_most() -> None:
    """Lengths become n^2 / (1 + n^2): short vectors nearly vanish, long ones stay just below one."""
    n = torch.tensor([1e-3, 0.1, 1.0, 10.0, 1000.0])
    vectors = n[:, None] * torch.tensor([[0.6, 0.8]])
    torch.testing.assert_close(length(squash(vectors)), n**2 / (1 + n**2), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("function", [squash, length])
def test_zero_vector_has_finite_gradient(function: object) -> None:
    """At the zero vector, value and gradient are finite."""
    assert callable(function)
    zero = torch.zeros(2, 8, requires_grad=True)
    value = function(zero)
    value.sum().backward()
    assert zero.grad is not None
    assert value.isfinite().all()
    assert zero.grad.isfinite().all()


def test_a_primary_capsule_is_neighbouring_channels_at_one_position() -> None:
    """Capsule g * 36 + p holds channels 8 g … 8 g + 7 at grid position p, and nothing else."""
    config = ModelConfig(classes=DIGITS)
    layer = PrimaryCapsules(config)
    channels = torch.rand(2, 256, 6, 6)
    layer.conv = torch.nn.Identity()  # type: ignore[assignment] # hand the channels through as they are
    u = layer(channels)
    assert u.shape == (2, 1152, 8)
    for group, row, column in [(0, 0, 0), (0, 0, 1), (5, 2, 3), (31, 5, 5)]:
        expected = squash(channels[:, 8 * group : 8 * group + 8, row, column])
        torch.testing.assert_close(u[:, 36 * group + 6 * row + column], expected)


def plain_routing(
    u: NDArray[np.float64], weight: NDArray[np.float64], iterations: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Procedure 1 as printed, for one image: u (N, I), W (N, K, D, I) -> v (K, D), c (N, K)."""
    u_hat = np.einsum("nkdi,ni->nkd", weight, u)
    b = np.zeros(u_hat.shape[:2])
    for _ in range(iterations):
        c = np.exp(b) / np.exp(b).sum(axis=1, keepdims=True)
        s = np.einsum("nk,nkd->kd", c, u_hat)
        n = np.linalg.norm(s, axis=1, keepdims=True)
        v = s * n / (1 + n**2)
        b = b + np.einsum("nkd,kd->nk", u_hat, v)
    return v, c


@pytest.mark.parametrize("num_groups", [None, 12, 4, 1])
@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
def test_routing_is_the_papers(num_groups: int | None, iterations: int) -> None:
    """The rearranged routing gives what the paper's procedure gives, with and without shared matrices."""
    layer = CapsuleLayer(12, 4, 5, 6, num_groups=num_groups, routing_iterations=iterations).double()
    with torch.no_grad():
        layer.weight.mul_(10)  # far from the uniform coupling that small predictions leave
    u = torch.randn(3, 12, 4, dtype=torch.float64)
    found = layer(u).detach().numpy()
    # Ours is (K, G, I, D); each of a group's capsules uses the group's matrix.
    per_group = layer.weight.detach().permute(1, 0, 3, 2).numpy()
    weight = np.repeat(per_group, 12 // layer.num_groups, axis=0)
    for image, v in zip(u.numpy(), found, strict=True):
        np.testing.assert_allclose(v, plain_routing(image, weight, iterations)[0], atol=1e-12)


@pytest.mark.parametrize("num_groups", [None, 4])
def test_coupling_coefficients(num_groups: int | None) -> None:
    """The coupling coefficients of one primary capsule sum to one across the digit capsules."""
    layer = CapsuleLayer(12, 4, 5, 6, num_groups=num_groups)
    with torch.no_grad():
        layer.weight.mul_(10)
    coupling = layer.route(torch.randn(3, 12, 4).unflatten(1, (layer.num_groups, -1)))  # (K, B, G, P)
    torch.testing.assert_close(coupling.sum(dim=0).flatten(1), torch.ones(3, 12))
    assert coupling.flatten(2).sum(dim=2).std() > 0.1, "over the inputs they need not sum to anything"


def test_the_encoder_has_the_switch_for_gradients(model_config: ModelConfig) -> None:
    """Gradients pass through the routing of a network that is built to, and of no other."""
    for through in (False, True):
        network = CapsNet(replace(model_config, routing_gradients=through))
        assert network.encoder.digit_capsules.routing_gradients is through


def test_first_weights_of_scaled_votes() -> None:
    """They are normal, of deviation 0.1, cut off at twice that to either side."""
    weight = PrimaryCapsules(
        ModelConfig(classes=DIGITS, conv_channels=4, scaled_votes=True)
    ).conv.weight.detach()
    assert -0.2 <= weight.min() < -0.19
    assert 0.19 < weight.max() <= 0.2
    assert weight.std() == pytest.approx(0.088, abs=0.002)


def test_shared_matrices_are_stored_once() -> None:
    """Sharing within each of 32 groups leaves 32 matrices for each class."""
    assert CapsuleLayer(1152, 8, 10, 16, num_groups=32).weight.shape == (10, 32, 8, 16)
    assert CapsuleLayer(1152, 8, 10, 16).weight.shape == (10, 1152, 8, 16)


def test_unequal_groups() -> None:
    """Groups that do not divide the capsules are refused."""
    with pytest.raises(ValueError, match="12 input capsules cannot form 5 equal groups"):
        CapsuleLayer(12, 4, 5, 6, num_groups=5)


@pytest.mark.parametrize("iterations", [1, 3])
def test_all_zero_capsules(iterations: int) -> None:
    """Primary capsules that are all zero give finite capsules and finite gradients."""
    layer = CapsuleLayer(12, 4, 5, 6, routing_iterations=iterations)
    u = torch.zeros(2, 12, 4, requires_grad=True)
    v = layer(u)
    length(v).sum().backward()
    assert v.isfinite().all()
    assert u.grad is not None
    assert u.grad.isfinite().all()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()


def test_gradient_of_the_last_weighted_sum() -> None:
    """The weights' gradient is that of the last weighted sum with its coupling coefficients held fixed."""
    layer = CapsuleLayer(6, 4, 3, 5).double()
    u = torch.randn(2, 6, 4, dtype=torch.float64)
    layer(u).sum().backward()
    found = layer.weight.grad
    assert found is not None
    coupling = layer.route(u.unsqueeze(2)).detach()[..., 0]  # (K, B, N)
    weight = layer.weight.detach().clone().requires_grad_()
    u_hat = torch.einsum("kgid,bgi->kbgd", weight, u)
    squash(torch.einsum("kbg,kbgd->bkd", coupling, u_hat)).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(found, weight.grad)


def test_mask_hides_the_other_capsules() -> None:
    """Only the target's capsule reaches the decoder, whatever the others hold."""
    capsules = torch.randn(2, 3, 4)
    masked = mask(capsules, torch.tensor([2, 0]))
    assert torch.equal(masked[0, 2], capsules[0, 2])
    assert torch.equal(masked[1, 0], capsules[1, 0])
    assert masked[0, :2].abs().sum() == 0
    assert masked[1, 1:].abs().sum() == 0


@pytest.fixture
def network(model_config: ModelConfig) -> CapsNet:
    network = CapsNet(model_config).eval()
    with torch.no_grad():
        network.encoder.digit_capsules.weight.mul_(20)  # clear winners, which a fresh network does not have
    return network


def noise(config: ModelConfig, count: int) -> Tensor:
    return torch.randint(0, 256, (count, *config.image_shape), dtype=torch.uint8)


def test_papers_size() -> None:
    """The paper's network has 8.2 million parameters, 6.8 million without the decoder."""
    network = CapsNet(ModelConfig(classes=DIGITS))
    assert sum(p.numel() for p in network.parameters()) == 8_215_568
    assert sum(p.numel() for p in network.encoder.parameters()) == 6_804_224


@pytest.mark.parametrize("count", [1, 2, 7])
def test_shapes(network: CapsNet, model_config: ModelConfig, count: int) -> None:
    """Any number of images, one included, gives as many sets of capsules and reconstructions."""
    capsules, reconstructions = network(noise(model_config, count))
    assert capsules.shape == (count, 3, 6)
    assert reconstructions.shape == (count, 13, 12)
    assert 0 <= reconstructions.min() <= reconstructions.max() <= 1


def test_colour() -> None:
    """Colour images of an odd size go in and come out as (B, H, W, 3)."""
    config = ModelConfig(classes=("a", "b"), height=18, width=23, channels=3, conv_channels=8)
    capsules, reconstructions = CapsNet(config)(noise(config, 2))
    assert capsules.shape == (2, 2, 16)
    assert reconstructions.shape == (2, 18, 23, 3)


def test_an_image_is_judged_alone(network: CapsNet, model_config: ModelConfig) -> None:
    """An image's capsules do not depend on the other images of its batch."""
    images = noise(model_config, 5)
    together = network.encoder(images)
    for i in range(5):
        torch.testing.assert_close(network.encoder(images[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-5)


def test_masked_by_the_label_while_learning(network: CapsNet, model_config: ModelConfig) -> None:
    """With labels, each reconstruction is drawn from its label's capsule."""
    images, labels = noise(model_config, 6), torch.arange(6) % 3
    capsules, reconstructions = network(images, labels)
    torch.testing.assert_close(reconstructions, network.decoder(capsules, labels))


def test_masked_by_the_longest_capsule_without_labels(network: CapsNet, model_config: ModelConfig) -> None:
    """Without labels, each reconstruction is drawn from the longest capsule."""
    images = noise(model_config, 40)
    capsules, reconstructions = network(images)
    longest = length(capsules).argmax(dim=-1)
    assert len(longest.unique()) > 1, "the images must not all have one winner"
    torch.testing.assert_close(reconstructions, network.decoder(capsules, longest))


def test_bytes_are_scaled_inside(network: CapsNet, model_config: ModelConfig) -> None:
    """The network takes bytes: 255 means one."""
    images = noise(model_config, 2)
    seen: list[Tensor] = []
    network.encoder.conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network.encoder(images)
    torch.testing.assert_close(seen[0], (images.float() / 255).unsqueeze(1))


def test_the_decoder_by_hand(network: CapsNet) -> None:
    """Two layers of rectified units and one of sigmoids draw the target's capsule."""
    capsules, target = torch.randn(4, 3, 6), torch.tensor([0, 1, 2, 1])
    first, second, last = (layer for layer in network.decoder.layers if isinstance(layer, torch.nn.Linear))
    hidden = second(first(mask(capsules, target).flatten(1)).clamp(min=0))
    assert (hidden < 0).any()
    expected = last(hidden.clamp(min=0)).sigmoid().reshape(4, 13, 12)
    torch.testing.assert_close(network.decoder(capsules, target), expected)


def test_training_step_at_zero_is_finite(model_config: ModelConfig) -> None:
    """A black image and its gradients are finite, even in a network whose biases are zero."""
    network = CapsNet(model_config)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    capsules, reconstructions = network(torch.zeros(2, 13, 12, dtype=torch.uint8), torch.tensor([0, 1]))
    (length(capsules).sum() + reconstructions.sum()).backward()
    for parameter in network.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_long_products() -> None:
    """What a GPU multiplies piece by piece, or for all classes at once, is the product."""
    torch.manual_seed(0)
    each, one, b = torch.randn(3, 5, 64), torch.randn(5, 64), torch.randn(3, 64, 4)
    torch.testing.assert_close(sum_of_pieces(each, b), each @ b)
    torch.testing.assert_close(for_all_classes(one, b), one @ b)
