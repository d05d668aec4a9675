"""The network's shape and the training run's settings: the one place where they are written down."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class _Stored:
    """Settings that a checkpoint carries as plain values."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raises ValueError for a setting that this code does not know."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown settings {unknown}; this code knows {sorted(known)}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@dataclass(frozen=True)
class ModelConfig(_Stored):
    """Shape of a capsule network. The defaults are the paper's, for its 28x28 grey digits."""

    classes: tuple[str, ...]
    height: int = 28
    width: int = 28
    channels: int = 1
    conv_channels: int = 256
    kernel_size: int = 9
    primary_groups: int = 32
    primary_dimensions: int = 8
    digit_dimensions: int = 16
    shared_weights: bool = False
    """One transformation matrix for all capsules of a primary group, instead of one for each capsule."""
    routing_iterations: int = 3
    decoder_units: tuple[int, int] = (512, 1024)

    def __post_init__(self) -> None:
        rows, columns = self.grid
        if rows < 1 or columns < 1:
            smallest = 2 * self.kernel_size - 1
            raise ValueError(
                f"images of {self.height}x{self.width} pixels leave no primary capsules; two "
                f"{self.kernel_size}x{self.kernel_size} convolutions need at least {smallest}x{smallest}"
            )
        if self.channels not in (1, 3):
            raise ValueError(f"images have {self.channels} channels, expected 1 (grey) or 3 (colour)")
        if len(self.classes) < 2:
            raise ValueError(f"there are {len(self.classes)} classes, expected at least 2")
        if self.routing_iterations < 1:
            raise ValueError(f"routing_iterations is {self.routing_iterations}, expected at least 1")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of primary capsules: what a stride-1 and a stride-2 convolution leave."""

        def positions(pixels: int) -> int:
            return (pixels - 2 * (self.kernel_size - 1) - 1) // 2 + 1

        return positions(self.height), positions(self.width)

    @property
    def primary_count(self) -> int:
        """Primary capsules in all: groups x positions."""
        rows, columns = self.grid
        return self.primary_groups * rows * columns

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W) for grey, (H, W, 3) for colour."""
        size = (self.height, self.width)
        return size if self.channels == 1 else (*size, self.channels)


@dataclass(frozen=True)
class TrainConfig(_Stored):
    """One training run. Equal settings give equal weights, on one machine with as many threads."""

    epochs: int = 50
    batch_size: int = 128
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    """The rate decays exponentially, step by step, from `learning_rate` to this at the last step."""
    max_shift: int = 2
    """Largest shift of a training image, in pixels, along each axis."""
    reconstruction_weight: float = 0.0005
    """Weight of the summed squared reconstruction error beside the margin loss."""
    validation_images: int = 5000
    """Training images held out for validation; 0 trains on all of them."""
    seed: int = 0
    device: str = "auto"
    precision: Precision = "auto"
    """Arithmetic of the convolutions; weights, capsules and losses are always fp32.

    `auto` is bf16 on CUDA and fp32 on the CPU.
    """

    def __post_init__(self) -> None:
        for name, smallest in (("epochs", 1), ("batch_size", 1), ("max_shift", 0), ("validation_images", 0)):
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {smallest}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, expected a whole number from 0 to 2^63 - 1")
        for name in ("learning_rate", "final_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive number")
        if not 0 <= self.reconstruction_weight < math.inf:
            raise ValueError(f"reconstruction_weight is {self.reconstruction_weight}, expected 0 or more")


TWEAK_RANGE = (-0.25, 0.25)
"""Smallest and largest change of one digit capsule dimension in figure 4."""
TWEAK_STEP = 0.05
