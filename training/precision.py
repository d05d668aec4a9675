"""The arithmetic that the convolutions, nearly all of the work, are trained in."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from training.config import Precision


def resolve_precision(name: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """The arithmetic that `name` comes to on `device`."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" else "fp32"


ALIGNED = 8
"""Numbers of 16 bits that matrices on a GPU should have a multiple of in a row."""


@contextmanager
def convolutions_in(network: nn.Module, arithmetic: str) -> Iterator[None]:
    """Run the convolutions of `network` in `arithmetic`; everything else stays in fp32."""
    if arithmetic == "fp32":
        yield
        return
    on_cpu = next(network.parameters()).device.type == "cpu"
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d) and _fits(module)]
    for conv in convolutions:
        forward = _on_cpu(conv) if on_cpu else _on_gpu(conv)
        conv.forward = forward  # type: ignore[assignment, method-assign] # hides the class's method, for a while
    try:
        yield
    finally:
        for conv in convolutions:
            del conv.forward


def _fits(conv: nn.Conv2d) -> bool:
    """Whether it is worth it, and of the kind written below."""
    # One for each channel by itself is too little work.
    usual = conv.dilation == (1, 1) and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return usual and conv.groups == 1


def _on_cpu(conv: nn.Conv2d) -> Callable[[Tensor], Tensor]:
    rows, columns = (int(pixels) for pixels in conv.padding)

    def forward(x: Tensor) -> Tensor:
        if conv.padding != (0, 0):
            x = F.pad(x, (columns, columns, rows, rows))
        return Bf16Convolution.apply(x, conv.weight, conv.bias, conv.stride)  # type: ignore[no-any-return, no-untyped-call] # torch's

    return forward


def _on_gpu(conv: nn.Conv2d) -> Callable[[Tensor], Tensor]:
    if conv.in_channels > 1:
        return torch.autocast("cuda", torch.bfloat16)(conv.forward)  # type: ignore[no-any-return] # torch's
    return as_product(conv)


def as_product(conv: nn.Conv2d) -> Callable[[Tensor], Tensor]:
    """The convolution of a single channel in bf16 as a product of matrices: cuDNN has no fast one."""

    def forward(x: Tensor) -> Tensor:
        rows, columns = (int(pixels) for pixels in conv.padding)
        height, width = conv.kernel_size
        x = F.pad(x.squeeze(1).bfloat16(), (columns, columns, rows, rows))
        patches = x.unfold(1, height, conv.stride[0]).unfold(2, width, conv.stride[1]).flatten(3)
        more = -patches.shape[-1] % ALIGNED
        patches, weight = F.pad(patches, (0, more)), F.pad(conv.weight.flatten(1).bfloat16(), (0, more))
        bias = None if conv.bias is None else conv.bias.bfloat16()
        return F.linear(patches, weight, bias).permute(0, 3, 1, 2)  # whose channels lie side by side

    return forward


class Bf16Convolution(torch.autograd.Function):
    """A convolution in bf16 whose weight gradient is one matrix product.

    oneDNN's own weight gradient in bf16 takes twice the time of that product on cores with AVX512-BF16 but
    without AMX; its other two directions run near the processor's peak. The product needs every patch of
    the input side by side: kernel height x kernel width / stride^2 times the input's memory, for a moment.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int]) -> Tensor:
        """x (B, C, H, W), weight (O, C, kh, kw), bias (O,) if any -> (B, O, rows, columns) in bf16."""
        x, weight = x.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, None if bias is None else bias.bfloat16(), stride)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None]:
        """Gradients of x, if it has one, weight, and bias, if there is one; the last two in fp32."""
        x, weight = ctx.saved_tensors
        gradient = gradients[0]
        rows, columns = ctx.stride
        height, width = weight.shape[2:]
        patches = x.permute(0, 2, 3, 1).unfold(1, height, rows).unfold(2, width, columns)
        patches = patches.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(0, 2)  # (B*rows*columns, kh*kw*C)
        flat = gradient.permute(0, 2, 3, 1).flatten(0, 2)  # (B*rows*columns, O)
        of_weight = (flat.mT @ patches).unflatten(1, (height, width, -1)).permute(0, 3, 1, 2)
        of_x = conv2d_input(x.shape, weight, gradient, ctx.stride) if ctx.needs_input_grad[0] else None
        of_bias = flat.sum(dim=0, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        return of_x, of_weight.float(), of_bias, None
