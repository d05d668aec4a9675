"""MultiMNIST, section 6: two digits of different classes on top of one another, made from MNIST as needed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from training.affine import pad
from training.data import shift

MARGIN = 4
"""Pixels around a digit, and the most that it is shifted by: 28x28 becomes 36x36 and no ink is lost.

The paper's figure; its authors' published code writes files of digits shifted by up to 6.
"""


@dataclass(frozen=True)
class Pairs:
    """Images of two digits each."""

    images: Tensor
    """(B, 36, 36) uint8: both digits added up, no pixel above 255."""
    labels: Tensor
    """(B, 2) int64."""
    digits: Tensor
    """(B, 2, 36, 36) uint8: each digit by itself, where it lies in the image."""


def pairs(
    images: Tensor, labels: Tensor, first: Tensor, generator: torch.Generator, most: int = MARGIN
) -> Pairs:
    """Lay another digit, of another class, over each of the digits `first` (B,), both moved by up to `most`.

    Args:
        images: all digits of one split, (M, 28, 28) uint8.
        labels: their classes, (M,).
    """
    chosen = torch.stack([first, partners(labels, first, generator)], dim=1)  # (B, 2)
    moved = torch.randint(-most, most + 1, (*chosen.shape, 2), generator=generator, device=images.device)
    rows, columns = moved.flatten(0, 1).unbind(dim=1)
    digits = shift(pad(images[chosen.flatten()], MARGIN), rows, columns).unflatten(0, chosen.shape)
    together = digits.sum(dim=1, dtype=torch.int32).clamp(max=255).to(torch.uint8)
    return Pairs(together, labels[chosen], digits)


def partners(labels: Tensor, first: Tensor, generator: torch.Generator) -> Tensor:
    """For each of the digits `first` (B,), one of another class, all of these being equally likely."""
    by_class = labels.argsort(stable=True)
    counts = labels.bincount()
    begin = counts.cumsum(0) - counts
    own = labels[first]
    others = len(labels) - counts[own]
    if bool((others == 0).any()):
        raise ValueError("all digits are of one class, expected at least two classes to make pairs of")
    # Double precision, so that 60,000 digits are told apart evenly.
    share = torch.rand(len(first), generator=generator, device=labels.device, dtype=torch.float64)
    drawn = (share * others).long()  # counted over the digits of all classes but its own
    return by_class[torch.where(drawn >= begin[own], drawn + counts[own], drawn)]
