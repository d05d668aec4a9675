from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training import precision
from training.config import ModelConfig
from training.model import CapsNet
from training.precision import Bf16Convolution, as_product, convolutions_in, resolve_precision
from training.predictor import TorchPredictor


def test_mixed_precision_touches_the_convolutions_alone(model_config: ModelConfig) -> None:
    """In bf16 the convolutions give bf16 and everything after them fp32; afterwards all is as before."""
    torch.manual_seed(0)
    network = CapsNet(model_config).eval()
    images = torch.randint(0, 256, (4, 13, 12), dtype=torch.uint8)
    before = TorchPredictor(network).encode(images.numpy())[0]
    kinds = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: kinds.append(output.dtype))
        for module in (network.encoder.conv, network.encoder.primary_capsules, network.encoder.digit_capsules)
    ]
    with convolutions_in(network, "bf16"):
        mixed, _ = network(images)
    assert kinds == [torch.bfloat16, torch.float32, torch.float32]
    for hook in hooks:
        hook.remove()
    assert 0 < (mixed - torch.from_numpy(before)).abs().max() < 0.05
    assert torch.equal(
        torch.from_numpy(TorchPredictor(network).encode(images.numpy())[0]), torch.from_numpy(before)
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 2)])
def test_gradients_are_those_of_the_convolution(channels: int, stride: tuple[int, int]) -> None:
    """Numbers that bf16 holds exactly give the output and the three gradients of an exact convolution."""
    generator = torch.Generator().manual_seed(0)

    def small(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=generator).float()

    inputs = [small(2, channels, 7, 9), small(4, channels, 3, 2), small(4)]
    exact = [value.clone().requires_grad_() for value in inputs]
    ours = [value.clone().requires_grad_() for value in inputs]
    image, weight, bias = exact
    expected = F.conv2d(image, weight, bias, stride)
    found = Bf16Convolution.apply(*ours, stride)  # type: ignore[no-untyped-call] # torch's
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.float(), expected)
    gradient = small(*expected.shape)
    expected.backward(gradient)
    found.backward(gradient.bfloat16())
    for one, other in zip(ours, exact, strict=True):
        assert other.grad is not None
        assert other.grad.abs().max() <= 256  # beyond it bf16 rounds whole numbers
        assert one.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_an_image_needs_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first convolution's input gets no gradient, and its work is not done."""
    weight, bias = torch.ones(2, 1, 3, 3, requires_grad=True), torch.zeros(2, requires_grad=True)
    output = Bf16Convolution.apply(torch.ones(1, 1, 5, 5), weight, bias, (1, 1))  # type: ignore[no-untyped-call] # torch's
    assert output.grad_fn.next_functions[0] == (None, 0)
    monkeypatch.setattr(precision, "conv2d_input", None)
    output.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full_like(weight, 9))  # each weight meets nine ones


def test_rows_and_columns_are_padded_apart() -> None:
    """By as much as the convolution says of each."""
    conv, x = nn.Conv2d(2, 4, 3, padding=(2, 1)), torch.rand(2, 2, 6, 6)
    with convolutions_in(conv, "bf16"):
        assert conv(x).shape == (2, 4, 8, 6)


def test_a_convolution_may_have_no_bias() -> None:
    """As those before a batch normalisation: it gives the same, and its weights their gradient."""
    torch.manual_seed(0)
    conv, x = nn.Conv2d(2, 4, 3, bias=False), torch.rand(2, 2, 6, 6)
    expected = conv(x)
    with convolutions_in(conv, "bf16"):
        found = conv(x)
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)
    gradients = [torch.autograd.grad(output.float().sum(), conv.weight)[0] for output in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    "kind", [{"padding_mode": "reflect"}, {"dilation": 2}, {"padding": "same"}, {"groups": 2}]
)
def test_an_unusual_convolution_stays_as_it_is(kind: dict[str, Any]) -> None:
    """What the written forms do not know is computed by PyTorch in fp32, and not as something else."""
    conv, x = nn.Conv2d(2, 4, 3, **{"padding": 1, **kind}), torch.rand(2, 2, 6, 6)
    with convolutions_in(conv, "bf16"):
        found = conv(x)
    assert torch.equal(found, conv(x))


def test_auto_precision() -> None:
    """`auto` is bf16 on CUDA and fp32 on the CPU; what is named stays."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [resolve_precision("auto", device) for device in (cpu, cuda)] == ["fp32", "bf16"]
    assert [resolve_precision("bf16", cpu), resolve_precision("fp32", cuda)] == ["bf16", "fp32"]


@pytest.mark.parametrize("padding", [0, (2, 1)])
def test_a_single_channel_as_a_product(padding: int | tuple[int, int]) -> None:
    """The product that stands for a GPU's convolution of one channel gives it and its gradients, in bf16."""
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 6, (5, 3), stride=(2, 1), padding=padding)
    x = torch.rand(3, 1, 14, 11)
    found = as_product(conv)(x)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.float(), conv(x), atol=2e-2, rtol=2e-2)
    gradients = torch.autograd.grad(found.float().sum(), list(conv.parameters()))
    expected = torch.autograd.grad(conv(x).sum(), list(conv.parameters()))
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, atol=2e-1, rtol=2e-2)
