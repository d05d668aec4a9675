"""Images made to be mistaken, by the network's own gradients: FGSM, BIM, and a BIM that minds the drawing.

FGSM: Goodfellow, Shlens and Szegedy, "Explaining and Harnessing Adversarial Examples" (2015). BIM: Kurakin,
Goodfellow and Bengio, "Adversarial Examples in the Physical World" (2017). R-BIM, which knows of detection by
reconstruction: after Frosst, Sabour and Hinton, "DARCCC" (2018).

All three move every pixel by whole grey levels, so that what they make can be sent as an image.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from training.losses import reconstruction_loss
from training.model import CapsNet, CapsuleLayer, length, scale

Loss = Callable[[Tensor], Tensor]
"""Images in grey levels, as floats, (B, H, W[, 3]) -> what an attack raises, (B,)."""
Attack = Callable[[CapsNet, Tensor, Tensor, int, int], Tensor]
"""Network, images (B, H, W[, 3]) uint8, labels (B,), most grey levels to move, steps -> images."""

STEPS = 10
"""Of BIM, which together go twice as far as a pixel may; R-BIM takes as many for either of its aims."""


def ascend(images: Tensor, losses: Sequence[Loss], most: int, step: int, steps: int) -> Tensor:
    """Move each pixel by `step` along the sign of the gradient, `steps` times, taking `losses` in turn.

    No pixel ends further than `most` from where it was, nor outside 0 … 255.

    Args:
        images: (B, H, W[, 3]) uint8.
    """
    start = images.float()
    x = start
    for i in range(steps):
        x = x.requires_grad_()
        (gradient,) = torch.autograd.grad(losses[i % len(losses)](x).sum(), x)
        moved = x.detach() + step * gradient.sign()
        x = moved.clamp(start - most, start + most).clamp(0, 255)
    return x.to(torch.uint8)


def excess(network: CapsNet, labels: Tensor) -> Loss:
    """How much longer another capsule is than the label's: above zero the image is mistaken.

    The margin loss would do less: it is flat where the network is sure, and has no gradient there.
    """

    def loss(x: Tensor) -> Tensor:
        lengths = length(network.encoder(x))
        own = lengths.gather(1, labels[:, None]).squeeze(1)
        return _others(lengths, labels).amax(dim=1) - own

    return loss


def likeness(network: CapsNet, labels: Tensor) -> Loss:
    """How well the longest capsule but the label's draws the image: its summed squared error, negative."""

    def loss(x: Tensor) -> Tensor:
        capsules = network.encoder(x)
        target = _others(length(capsules), labels).argmax(dim=1)
        return -reconstruction_loss(network.decoder(capsules, target), scale(x))

    return loss


def _others(lengths: Tensor, labels: Tensor) -> Tensor:
    """Capsule lengths (B, K) with the labels' out of the running."""
    return lengths - 2 * F.one_hot(labels, lengths.shape[1])


def fgsm(network: CapsNet, images: Tensor, labels: Tensor, most: int, _: int) -> Tensor:
    """One step of the whole way."""
    return ascend(images, [excess(network, labels)], most, most, 1)


def bim(network: CapsNet, images: Tensor, labels: Tensor, most: int, steps: int) -> Tensor:
    """Small steps."""
    return ascend(images, [excess(network, labels)], most, _step(most, steps), steps)


def aware_bim(network: CapsNet, images: Tensor, labels: Tensor, most: int, steps: int) -> Tensor:
    """Small steps towards another class, and towards what its capsule draws, in turn."""
    losses = [excess(network, labels), likeness(network, labels)]
    return ascend(images, losses, most, _step(most, steps), 2 * steps)


def _step(most: int, steps: int) -> int:
    return -(-2 * most // steps)


ATTACKS: dict[str, Attack] = {"FGSM": fgsm, "BIM": bim, "R-BIM": aware_bim}


def open_to_attack(network: CapsNet) -> None:
    """Let gradients reach the images by every way there is, routing included, and the weights by none."""
    network.requires_grad_(False)
    routing = network.encoder.digit_capsules
    if isinstance(routing, CapsuleLayer):  # otherwise gradients pass through its routing anyway
        routing.routing_gradients = True
