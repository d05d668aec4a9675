"""Images turned, sheared, stretched and moved: affNIST's kind of test, and MNIST on a larger canvas."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

CANVAS = 40
"""Side of affNIST's images, and of those that the paper trains on for it."""
ROTATION = 20.0
SHEAR = 0.2
SCALE = (0.8, 1.2)
"""affNIST's ranges, each drawn uniformly: degrees; pixels for each pixel of height; of each axis."""


def pad(images: Tensor, margin: int) -> Tensor:
    """(B, H, W) -> (B, H + 2 margin, W + 2 margin), black around the image."""
    return F.pad(images, (margin, margin, margin, margin))


def warp(images: Tensor, linear: Tensor, shift: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Map each image about its centre: a point p (x, y) goes to linear p + shift, in pixels.

    Between pixels it interpolates, and what comes from outside the frame is black.

    Args:
        images: (B, H, W[, 3]) uint8.
        linear: (B, 2, 2).
        shift: (B, 2), right and down.
        size: height and width of the results; the images' own if unset.

    Returns:
        (B, height, width[, 3]) uint8.
    """
    grey = images.ndim == 3
    x = (images.unsqueeze(1) if grey else images.movedim(-1, 1)).float()
    height, width = size or (x.shape[2], x.shape[3])
    back = torch.linalg.inv(linear)  # where each pixel of the result comes from
    offset = -(back @ shift.unsqueeze(-1))  # (B, 2, 1)
    # PyTorch counts from -1 to 1 over the frame, so pixels of both frames become halves of frames.
    into = back.new_tensor([2 / x.shape[3], 2 / x.shape[2]])[:, None]
    out = back.new_tensor([width / 2, height / 2])
    theta = torch.cat([into * back * out, into * offset], dim=2)  # (B, 2, 3)
    grid = F.affine_grid(theta, [len(x), x.shape[1], height, width], align_corners=False)
    warped = F.grid_sample(x, grid, padding_mode="zeros", align_corners=False)
    result = warped.round().clamp(0, 255).to(torch.uint8)
    return result.squeeze(1) if grey else result.movedim(1, -1)


def rotation(degrees: Tensor) -> Tensor:
    """Turn by (B,) degrees, clockwise on the screen, where y points down: (B, 2, 2)."""
    angle = degrees * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], dim=-1), torch.stack([sin, cos], dim=-1)], dim=-2)


def uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """(count,) numbers between `low` and `high`, on the generator's device."""
    return low + (high - low) * torch.rand(count, generator=generator, device=generator.device)


def like_affnist(images: Tensor, generator: torch.Generator) -> Tensor:
    """One affNIST-like image, (B, 40, 40), of each MNIST digit (B, 28, 28).

    Sheared, stretched, turned, and then moved by a whole number of pixels along each axis, drawn uniformly
    from those that keep all of the ink in the frame.
    """
    count = len(images)
    linear = rotation(uniform(count, -ROTATION, ROTATION, generator))
    shear = torch.eye(2, device=images.device).repeat(count, 1, 1)
    shear[:, 0, 1] = uniform(count, -SHEAR, SHEAR, generator)
    stretch = torch.stack([uniform(count, *SCALE, generator) for _ in range(2)], dim=-1)
    linear = linear @ torch.diag_embed(stretch) @ shear
    still = torch.zeros(count, 2, device=images.device)
    # On a canvas that loses no ink, first; a turned and stretched 28x28 frame is at most 52 pixels wide.
    large = warp(images, linear, still, (CANVAS + 16, CANVAS + 16))
    return _anywhere(large, generator)


def _anywhere(images: Tensor, generator: torch.Generator) -> Tensor:
    """Cut (B, 40, 40) out of larger images (B, S, S), somewhere where all of the ink is inside."""
    side = images.shape[1]

    def cut(inked: Tensor) -> Tensor:
        """First row or column to keep, (B,), of `inked` (B, S)."""
        first, last = _ends(inked)
        # The window [start, start + 40) has to hold both ends; without any ink every window does.
        least = (last - CANVAS + 1).clamp(0, side - CANVAS)
        most = first.clamp(0, side - CANVAS).maximum(least)
        share = torch.rand(len(images), generator=generator, device=images.device)
        return least + (share * (most - least + 1)).long()

    ink = images > 0
    rows, columns = cut(ink.any(dim=2)), cut(ink.any(dim=1))
    window = torch.arange(CANVAS, device=images.device)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return images[batch, (rows[:, None] + window)[:, :, None], (columns[:, None] + window)[:, None, :]]


def _ends(inked: Tensor) -> tuple[Tensor, Tensor]:
    """First and last inked place of (B, S), (B,) each; S and -1 without any ink."""
    side = inked.shape[1]
    positions = torch.arange(side, device=inked.device)
    return torch.where(inked, positions, side).amin(dim=1), torch.where(inked, positions, -1).amax(dim=1)


def strongly(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn half of the digits (B, H, W), squeeze, shift, erase a patch: after Efficient-CapsNet, but weaker.

    Turned by up to 30 degrees, a third of that being usual; squeezed by up to a quarter of the width; moved
    within the free margin; a black square of 4x4 pixels somewhere. What differs: docs/decisions/0009.
    """
    count, height, width = images.shape[:3]

    def usual() -> Tensor:
        """Normal, of standard deviation 0.33, within [-1, 1]."""
        drawn = torch.randn(count, generator=generator, device=images.device)
        return (0.33 * drawn).clamp(-1, 1)

    turned = uniform(count, 0, 1, generator) < 0.5
    linear = rotation(torch.where(turned, 30 * usual(), 0))
    squeeze = torch.ones(count, 2, device=images.device)
    squeeze[:, 0] = 1 - usual().abs() / 4
    ink = (images > 0).reshape(count, height, width, -1).any(dim=3)
    shift = torch.stack([_free(ink.any(dim=1), usual()), _free(ink.any(dim=2), usual())], dim=-1)
    moved = warp(images, torch.diag_embed(squeeze) @ linear, shift)
    top = torch.randint(0, height - 3, (count,), generator=generator, device=images.device)[:, None]
    left = torch.randint(0, width - 3, (count,), generator=generator, device=images.device)[:, None]
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    patch = ((y >= top) & (y < top + 4))[:, :, None] & ((x >= left) & (x < left + 4))[:, None, :]
    return moved.masked_fill(patch if images.ndim == 3 else patch.unsqueeze(-1), 0)


def _free(inked: Tensor, share: Tensor) -> Tensor:
    """A share (B,) in [-1, 1] of the margin before, or after, the ink of (B, S), in whole pixels."""
    before, last = _ends(inked)
    margin = torch.where(share < 0, before, inked.shape[1] - 1 - last)
    return (share * margin).trunc()
