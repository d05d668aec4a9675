"""Efficient-CapsNet: "Capsule Network with Self-Attention Routing" (Mazzia, Salvetti and Chiaberge, 2021).

The letters of `training.model`; here N, the primary capsules, is 16, and each sees the whole image.
"""

import math

import torch
from torch import Tensor, nn

from training.config import EFFICIENT_CHANNELS, ModelConfig
from training.model import EPSILON, CapsNet, Decoder, as_channels

MOMENTUM = 0.01
"""Weight of a batch among the statistics so far, by which images are judged: the authors' framework's."""


def momentum(steps: int) -> float:
    """That weight in a run of so many steps: larger in a short one, lest it be judged by its first weights.

    The statistics are then those of the last thirtieth of the run, or of ten batches if that is more.
    """
    return max(MOMENTUM, min(0.1, 30 / steps))


def steep_squash(s: Tensor) -> Tensor:
    """Shrink each vector of (…, D) to 1 - exp(-length) and keep its direction: steep at zero."""
    n = (s.square().sum(dim=-1, keepdim=True) + EPSILON).sqrt()
    return s * (-torch.expm1(-n) / n)


class SelfAttentionRouting(nn.Module):
    """Capsules whose coupling is found in one pass, from how well the predictions agree with one another.

    Where routing by agreement asks again and again how a prediction agrees with what it helped to predict,
    here its dot product with all predictions for the same capsule is taken once:

        c_kn = softmax over k of (u_hat_kn . sum_m u_hat_km) / sqrt(D), plus a learned bias
    """

    def __init__(self, in_capsules: int, in_dimensions: int, out_capsules: int, out_dimensions: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_capsules, in_capsules, in_dimensions, out_dimensions))
        # He's normal start. The fan-in is what the authors' framework makes of these four axes.
        fan_in = out_capsules * in_capsules * in_dimensions
        nn.init.trunc_normal_(self.weight, std=math.sqrt(2 / fan_in))
        self.bias = nn.Parameter(torch.zeros(out_capsules, in_capsules))

    def forward(self, u: Tensor) -> Tensor:
        """Capsules below, (B, N, I) -> capsules v of this layer, (B, K, D)."""
        u_hat = torch.einsum("bni,knid->bknd", u, self.weight)
        agreement = (u_hat * u_hat.sum(dim=2, keepdim=True)).sum(dim=-1)  # (B, K, N)
        coupling = (agreement / math.sqrt(u_hat.shape[-1])).softmax(dim=1) + self.bias
        return steep_squash((coupling.unsqueeze(-1) * u_hat).sum(dim=2))


class EfficientEncoder(nn.Module):
    """Four convolutions, each normalised over the batch, and one that looks at the whole grid, channel by
    channel: 161,824 parameters for MNIST, the digit capsules included."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = config.channels
        for channels, kernel, stride in zip(EFFICIENT_CHANNELS, (5, 3, 3, 3), (1, 1, 1, 2), strict=True):
            conv = nn.Conv2d(before, channels, kernel, stride)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type] # it has one
            # The constants of the framework that the authors used.
            layers += [conv, nn.ReLU(), nn.BatchNorm2d(channels, eps=1e-3, momentum=MOMENTUM)]
            before = channels
        self.features = nn.Sequential(*layers)
        self.dimensions = config.primary_dimensions
        self.primary = nn.Conv2d(before, before, config.grid, groups=before)
        self.digit_capsules = SelfAttentionRouting(
            config.primary_count, config.primary_dimensions, len(config.classes), config.digit_dimensions
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images as bytes, (B, H, W[, 3]) uint8 -> digit capsules, (B, K, D)."""
        channels = self.primary(self.features(as_channels(images)).float()).float()  # (B, N*I, 1, 1)
        u = steep_squash(channels.flatten(1).unflatten(1, (-1, self.dimensions)))  # (B, N, I)
        capsules: Tensor = self.digit_capsules(u)
        return capsules


class EfficientCapsNet(CapsNet):
    """The smaller network, with the same decoder behind it."""

    def __init__(self, config: ModelConfig) -> None:
        nn.Module.__init__(self)  # without the paper's encoder, which is 40 times as large
        self.config = config
        self.encoder = EfficientEncoder(config)  # type: ignore[assignment] # in its place, and as callable
        self.decoder = Decoder(config)
