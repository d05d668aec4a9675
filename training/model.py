"""The capsule network of "Dynamic Routing Between Capsules" (Sabour, Frosst and Hinton, 2017).

Read it top to bottom with the paper beside it; equation and section numbers are the paper's.

One letter per dimension, throughout:
    B  images in the batch
    G  groups of primary capsules (32)
    P  positions in the grid of each group (36 = 6 x 6 for 28x28 images)
    N  primary capsules in all, N = G * P, ordered group by group
    K  classes, one digit capsule for each
    I  dimensions of a primary capsule (8)
    D  dimensions of a digit capsule (16)
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.config import ModelConfig

# Keeps the square root's gradient finite at the zero vector; far below any squared length that matters.
EPSILON = 1e-12
AUTHORS_BIAS = 0.1
"""Every bias of the authors' published code begins with this."""


def scale(images: Tensor) -> Tensor:
    """Bytes to numbers in [0, 1]."""
    return images.float() / 255


def as_channels(images: Tensor) -> Tensor:
    """Images as bytes, (B, H, W[, 3]) uint8 -> what a convolution takes, (B, channels, H, W) in [0, 1]."""
    x = scale(images)
    return x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2)


def length(capsules: Tensor) -> Tensor:
    """Length of each capsule, (…, D) -> (…): how sure the network is that the entity is present."""
    return (capsules.square().sum(dim=-1) + EPSILON).sqrt()


def squash(s: Tensor) -> Tensor:
    """Shrink each vector of (…, D) to a length below one and keep its direction (equation 1)."""
    squared = s.square().sum(dim=-1, keepdim=True)
    return s * ((squared + EPSILON).sqrt() / (1 + squared))


CACHED_IMAGES = 8
"""How many images a CPU routes at once, so that what the iterations share stays in its cache: a training step
with a batch of 128 takes 7 % less time than with all at once (two threads, fp32)."""


PIECES = 16
"""Of a sum over all capsules, on a GPU, which has more processors than such a product has tiles: on an H100
0.04 ms and a copy, instead of 0.31 ms (batch 128)."""


def long_product(a: Tensor, b: Tensor) -> Tensor:
    """(…, B, M) @ (…, M, D), for M much larger than B and D."""
    if a.device.type == "cpu":
        return a @ b
    if a.ndim == 2:
        return for_all_classes(a, b)
    return a @ b if a.shape[-1] % PIECES else sum_of_pieces(a, b)


def for_all_classes(a: Tensor, b: Tensor) -> Tensor:
    """(B, M) @ (K, M, D), as a single product."""
    return torch.einsum("bm,kmd->kbd", a, b)


def sum_of_pieces(a: Tensor, b: Tensor) -> Tensor:
    """(K, B, M) @ (K, M, D), with M cut into `PIECES`."""
    products = a.unflatten(-1, (PIECES, -1)).transpose(-3, -2) @ b.unflatten(-2, (PIECES, -1))
    return torch.sum(products, dim=-3)


class PrimaryCapsules(nn.Module):
    """Section 4: a convolution whose G * I channels at each grid position are G capsules."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.groups = config.primary_groups
        self.dimensions = config.primary_dimensions
        self.conv = nn.Conv2d(
            config.conv_channels, self.groups * self.dimensions, config.kernel_size, stride=2
        )
        self.scaled_votes = config.scaled_votes
        if self.scaled_votes:  # first weights as large as the authors', for what is left after the division
            nn.init.trunc_normal_(self.conv.weight, std=0.1, a=-0.2, b=0.2)
            nn.init.constant_(self._bias, AUTHORS_BIAS)

    def forward(self, features: Tensor) -> Tensor:
        """(B, conv_channels, rows, columns) -> primary capsules u, (B, N, I)."""
        channels = self.conv(features).float()  # (B, G*I, rows, columns)
        if self.scaled_votes:  # all but the bias
            channels = torch.lerp(self._bias[:, None, None], channels, 1 / self.groups)
        # One capsule is I neighbouring channels at one position, so the position must come before
        # the dimension: (B, G, I, P) -> (B, G, P, I) -> (B, N, I).
        u = channels.flatten(2).unflatten(1, (self.groups, self.dimensions)).transpose(2, 3)
        return squash(u.flatten(1, 2))

    @property
    def _bias(self) -> Tensor:
        bias: Tensor = self.conv.bias  # type: ignore[assignment] # it has one
        return bias


class CapsuleLayer(nn.Module):
    """Capsules fully connected to the N capsules below, through routing by agreement (procedure 1).

    The paper predicts each capsule k (its j) from each capsule n below (its i), u_hat_kn = W_kn u_n, and
    routes: s_k = sum_n c_kn u_hat_kn, then b_kn += u_hat_kn . v_k. Both uses of u_hat are linear in it, so
    W can move out of the sum and to the other side of the dot product. With capsule n written as position
    p of group g,

        s_k = sum_g W_kg (sum_p c_kgp u_gp)        u_hat_kgp . v_k = u_gp . (W_kg^T v_k)

    and u_hat, N * K * D numbers for each image, never exists. The capsules of a group share one matrix
    W_kg; `num_groups` = N, the default and the paper's choice, makes every group a single capsule.

    The coupling coefficients are found by a procedure and not learned: gradients pass through the last
    weighted sum alone, unless `routing_gradients` are asked for. The paper does not say whether its own did
    more.
    """

    def __init__(
        self,
        in_capsules: int,
        in_dimensions: int,
        out_capsules: int,
        out_dimensions: int,
        *,
        num_groups: int | None = None,
        routing_iterations: int = 3,
        biases: bool = False,
        routing_gradients: bool = False,
    ) -> None:
        super().__init__()
        self.num_groups = in_capsules if num_groups is None else num_groups
        if in_capsules % self.num_groups:
            raise ValueError(f"{in_capsules} input capsules cannot form {self.num_groups} equal groups")
        self.routing_iterations = routing_iterations
        self.weight = nn.Parameter(  # transformation matrices, transposed and class by class: (K, G, I, D)
            0.1 * torch.randn(out_capsules, self.num_groups, in_dimensions, out_dimensions)
        )
        self.routing_gradients = routing_gradients
        self.bias = (
            nn.Parameter(torch.full((out_capsules, 1, out_dimensions), AUTHORS_BIAS)) if biases else None
        )

    def forward(self, u: Tensor) -> Tensor:
        """Capsules below, (B, N, I) -> capsules v of this layer, (B, K, D)."""
        u = u.unflatten(1, (self.num_groups, -1))  # (B, G, P, I)
        if self.routing_iterations == 1:
            v = self.output(self.uniform_sum(u))
        else:
            with nullcontext() if self.routing_gradients else torch.no_grad():
                parts = u.split(CACHED_IMAGES if u.device.type == "cpu" else max(1, len(u)))
                coupling = torch.cat([self.route(part) for part in parts], dim=1)
            v = self.output(self.weighted_sum(coupling, u))
        return v.transpose(0, 1)

    def route(self, u: Tensor) -> Tensor:
        """Coupling coefficients c (K, B, G, P) of u (B, G, P, I): how much of each capsule goes where."""
        v = self.output(self.uniform_sum(u))
        logits = self.agreement(u, v)  # b, which starts at zero
        for _ in range(self.routing_iterations - 2):
            v = self.output(self.weighted_sum(logits.softmax(dim=0), u))
            logits = logits + self.agreement(u, v)
        return logits.softmax(dim=0)  # over the K output capsules, never over the inputs

    def output(self, s: Tensor) -> Tensor:
        """Capsules v (K, B, D) of weighted sums s."""
        return squash(s if self.bias is None else s + self.bias)

    def uniform_sum(self, u: Tensor) -> Tensor:
        """s (K, B, D) for logits that are all zero, whose softmax gives every output capsule 1/K."""
        pooled = u.sum(dim=2) / self.weight.shape[0]  # (B, G, I)
        return long_product(pooled.flatten(1), self.weight.flatten(1, 2))

    def weighted_sum(self, coupling: Tensor, u: Tensor) -> Tensor:
        """s (K, B, D) for coupling coefficients (K, B, G, P)."""
        alone = u.shape[2] == 1  # nothing to add up inside a group of one: a multiplication does
        pooled = coupling * u.squeeze(2) if alone else torch.einsum("kbgp,bgpi->kbgi", coupling, u)
        return long_product(pooled.flatten(2), self.weight.flatten(1, 2))

    def agreement(self, u: Tensor, v: Tensor) -> Tensor:
        """u_hat . v, (K, B, G, P), for output capsules v (K, B, D)."""
        back = torch.bmm(v, self.weight.flatten(1, 2).mT)  # W^T v, (K, B, G*I)
        back = back.unflatten(2, (self.num_groups, -1))
        alone = u.shape[2] == 1
        agreement: Tensor = (
            (back * u.squeeze(2)).sum(dim=-1, keepdim=True)
            if alone
            else torch.einsum("kbgi,bgpi->kbgp", back, u)
        )
        return agreement


def mask(capsules: Tensor, target: Tensor) -> Tensor:
    """Zero every capsule of (B, K, D) but the one that `target` (B,) names (section 4.1)."""
    keep = F.one_hot(target, capsules.shape[1]).to(capsules.dtype)
    return capsules * keep.unsqueeze(-1)


class Decoder(nn.Module):
    """Figure 2: three fully connected layers draw the image from one digit capsule."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.image_shape = config.image_shape
        first, second = config.decoder_units
        pixels = config.height * config.width * config.channels
        self.layers = nn.Sequential(
            nn.Linear(len(config.classes) * config.digit_dimensions, first),
            nn.ReLU(),
            nn.Linear(first, second),
            nn.ReLU(),
            nn.Linear(second, pixels),
            nn.Sigmoid(),
        )

    def forward(self, capsules: Tensor, target: Tensor) -> Tensor:
        """Digit capsules (B, K, D) and the class to draw (B,) -> reconstructions (B, H, W[, 3]) in [0, 1]."""
        pixels: Tensor = self.layers(mask(capsules, target).flatten(1))
        return pixels.reshape(-1, *self.image_shape)


class Encoder(nn.Module):
    """Figure 1: a convolution, primary capsules, digit capsules."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.conv = nn.Conv2d(config.channels, config.conv_channels, config.kernel_size)
        self.primary_capsules = PrimaryCapsules(config)
        self.digit_capsules = CapsuleLayer(
            config.primary_count,
            config.primary_dimensions,
            len(config.classes),
            config.digit_dimensions,
            num_groups=config.primary_groups if config.shared_weights else None,
            routing_iterations=config.routing_iterations,
            biases=config.capsule_biases,
            routing_gradients=config.routing_gradients,
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images as bytes, (B, H, W[, 3]) uint8 -> digit capsules, (B, K, D)."""
        features = F.relu(self.conv(as_channels(images)))
        capsules: Tensor = self.digit_capsules(self.primary_capsules(features))
        return capsules


class CapsNet(nn.Module):
    """The whole network: encode an image once, decode its capsules as often as you like."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def forward(self, images: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Digit capsules (B, K, D) and reconstructions (B, H, W[, 3]) of uint8 `images`.

        The label masks the capsules while learning; without one, the longest capsule does. Labels (B, L)
        of images of several digits give as many reconstructions, (B, L, H, W[, 3]), each from its own
        capsule.
        """
        capsules = self.encoder(images)
        if target is None:
            target = length(capsules).argmax(dim=-1)
        if target.ndim == 1:
            return capsules, self.decoder(capsules, target)
        return capsules, torch.stack([self.decoder(capsules, one) for one in target.unbind(dim=1)], dim=1)
