"""The same network as most implementations write it: u_hat by einsum, stored, and read in every iteration.

It is what speed is compared with, exported from the weights of a model in `models/`.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.export import write_traced_encoder
from training.model import CapsNet, squash


class PlainEncoder(nn.Module):
    """`Encoder`, by procedure 1 to the letter."""

    def __init__(self, network: CapsNet) -> None:
        super().__init__()
        encoder = network.encoder
        self.conv, self.primary_capsules = encoder.conv, encoder.primary_capsules
        self.iterations = encoder.digit_capsules.routing_iterations
        weight = encoder.digit_capsules.weight.detach()  # (K, N, I, D)
        self.weight = nn.Parameter(weight.transpose(0, 1).contiguous())  # (N, K, I, D)

    def forward(self, images: Tensor) -> Tensor:
        u = self.primary_capsules(F.relu(self.conv(images.unsqueeze(1).float() / 255)))
        u_hat = torch.einsum("nkid,bni->bnkd", self.weight, u)
        logits = torch.zeros_like(u_hat[..., 0])
        for last in [False] * (self.iterations - 1) + [True]:
            v = squash(torch.einsum("bnk,bnkd->bkd", logits.softmax(dim=2), u_hat))
            if last:
                return v
            logits = logits + torch.einsum("bnkd,bkd->bnk", u_hat, v)
        raise ValueError("there is at least one iteration")


def write_plain_encoder(network: CapsNet, path: Path) -> None:
    """Export it as anybody would, with PyTorch's exporter."""
    write_traced_encoder(PlainEncoder(network), network.config, path)
