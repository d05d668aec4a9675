"""The network's shape and the training run's settings: the one place where they are written down."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "bf16"]
Schedule = Literal["exponential", "authors"]
Architecture = Literal["capsnet", "efficient-capsnet", "baseline-cnn", "multimnist-cnn", "affnist-cnn"]
Augmentation = Literal["shift", "strong"]

EFFICIENT_CHANNELS = (32, 64, 64, 128)
"""Of the four convolutions of Efficient-CapsNet; the last ones are cut into primary capsules."""


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

    def _require_word(self, name: str, words: Any) -> None:
        if getattr(self, name) not in get_args(words):
            raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {list(get_args(words))}")


@dataclass(frozen=True)
class ModelConfig(_Stored):
    """Shape of a network. The defaults are those of the paper's, for its 28x28 grey digits."""

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
    architecture: Architecture = "capsnet"
    """Efficient-CapsNet has widths and kernels of its own, and no routing iterations; the CNNs take
    `conv_channels` alone."""

    # Three things that the authors' published code does and the paper does not say (docs/decisions/0007).
    capsule_biases: bool = False
    """Digit capsules have a bias, added to their weighted sum before it is squashed, in each iteration."""
    scaled_votes: bool = False
    """Primary capsules divide what the convolution sums up by their number of groups, before its bias; its
    weights begin larger in return."""
    routing_gradients: bool = False
    """Gradients pass through all routing iterations, not through the last weighted sum alone."""

    def __post_init__(self) -> None:
        self._require_word("architecture", Architecture)
        routing = (
            "shared_weights",
            "routing_iterations",
            "capsule_biases",
            "scaled_votes",
            "routing_gradients",
        )
        for name in routing if self.architecture != "capsnet" else ():
            if getattr(self, name) != getattr(ModelConfig, name):  # which has the default
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but {self.architecture} has no such choice"
                )
        smallest = {
            "capsnet": 2 * self.kernel_size - 1,
            "efficient-capsnet": 11,
            "baseline-cnn": 1,
            "multimnist-cnn": 4,
            "affnist-cnn": 20,
        }
        least = smallest[self.architecture]
        if self.height < least or self.width < least:
            raise ValueError(
                f"images of {self.height}x{self.width} pixels leave no primary capsules; the convolutions of "
                f"{self.architecture} need at least {least}x{least}"
            )
        if self.channels not in (1, 3):
            raise ValueError(f"images have {self.channels} channels, expected 1 (grey) or 3 (colour)")
        if len(self.classes) < 2:
            raise ValueError(f"there are {len(self.classes)} classes, expected at least 2")
        if self.architecture == "efficient-capsnet" and EFFICIENT_CHANNELS[-1] % self.primary_dimensions:
            raise ValueError(
                f"primary_dimensions is {self.primary_dimensions}, expected a divisor of "
                f"{EFFICIENT_CHANNELS[-1]} for efficient-capsnet"
            )
        if self.routing_iterations < 1:
            raise ValueError(f"routing_iterations is {self.routing_iterations}, expected at least 1")

    def __str__(self) -> str:
        """By what people choose of it."""
        images = f"{self.width}x{self.height} images in {'grey' if self.channels == 1 else 'colour'}"
        return f"{self.architecture} for {len(self.classes)} classes of {images}"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns that the convolutions leave: the grid of each group of primary capsules."""

        def positions(pixels: int) -> int:
            if self.architecture == "baseline-cnn":  # padded: as many as before
                return pixels
            if self.architecture == "multimnist-cnn":  # padded too, and halved twice
                return pixels // 2 // 2
            if self.architecture == "affnist-cnn":  # 9x9, halved, 5x5, halved
                return ((pixels - 8) // 2 - 4) // 2
            if self.architecture == "efficient-capsnet":  # 5x5, 3x3, 3x3, and 3x3 with stride 2
                return (pixels - 8 - 3) // 2 + 1
            return (pixels - 2 * (self.kernel_size - 1) - 1) // 2 + 1

        return positions(self.height), positions(self.width)

    @property
    def primary_count(self) -> int:
        """Primary capsules in all: groups x positions, or Efficient-CapsNet's channels cut into capsules."""
        if self.architecture == "efficient-capsnet":
            return EFFICIENT_CHANNELS[-1] // self.primary_dimensions
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
    schedule: Schedule = "exponential"
    """`authors`: the published code's instead, which knows no last step (`AUTHORS_DECAY`)."""
    warm_up_steps: int = 0
    """Over so many first steps, a tenth of all or `LEAST_RISE` at most, the rate rises to the schedule's."""
    max_shift: int = 2
    """Largest shift of a training image, in pixels, along each axis."""
    augmentation: Augmentation = "shift"
    """`strong`: turned, squeezed, shifted within the frame and partly erased, after Efficient-CapsNet."""
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
        self._require_word("schedule", Schedule)
        self._require_word("augmentation", Augmentation)
        least = {"epochs": 1, "batch_size": 1, "max_shift": 0, "validation_images": 0, "warm_up_steps": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {smallest}")
        require_seed(self.seed)
        for name in ("learning_rate", "final_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive number")
        if not 0 <= self.reconstruction_weight < math.inf:
            raise ValueError(f"reconstruction_weight is {self.reconstruction_weight}, expected 0 or more")

    def learning_rate_at(self, step: int, steps: int) -> float:
        """Adam's rate at `step` of a run of `steps`."""
        return min(1.0, (step + 1) / max(1, self.rise(steps))) * self._scheduled(step, steps)

    def rise(self, steps: int) -> int:
        """Steps over which the rate rises in a run of `steps`."""
        return min(self.warm_up_steps, max(LEAST_RISE, steps // 10))

    def steps_in_epoch(self, training_images: int) -> int:
        return math.ceil(training_images / self.batch_size)

    def _scheduled(self, step: int, steps: int) -> float:
        if self.schedule == "authors":
            factor, every, least = AUTHORS_DECAY
            return max(least, float(self.learning_rate * factor ** (step / every)))
        decay = self.final_learning_rate / self.learning_rate
        return float(self.learning_rate * decay ** (step / max(1, steps - 1)))


def require_seed(seed: int) -> None:
    """Raise ValueError for what PyTorch's generators do not take as one."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}, expected a whole number from 0 to 2^63 - 1")


PAPERS_CAPSULES = 1152
PAPERS_CLASSES = 10
"""Primary capsules of 28x28 pixels, which learn so many classes at the full rate from the first step on."""
WARM_UP_STEPS = 100
"""For more of the former for each of the latter. Adam's first step moves each weight by the whole rate, and
so a sum over all primary capsules, each shared among the classes, by as much more as there are more capsules
or fewer classes: every class's capsule becomes as long as can be, where the loss has no gradient."""

LEAST_RISE = 40
"""Of these steps, how many at least are taken in a short run. After 3 or 4 of them that still happens, and
after 10 with two classes. See docs/decisions/0046."""


def warm_up_steps(model: ModelConfig) -> int:
    """Steps over which the rate should rise for this network, in a run that is long enough."""
    classes = min(PAPERS_CLASSES, len(model.classes))
    delicate = model.shared_weights or model.primary_count / classes > PAPERS_CAPSULES / PAPERS_CLASSES
    return WARM_UP_STEPS if model.architecture == "capsnet" and delicate else 0


LEAST_STEPS_AN_EPOCH = 10
LEAST_BATCH = 8


def batch_size(training_images: int) -> int:
    """Images a step: as many as usual, or so few, a power of two, that an epoch has enough steps.

    A hundred images in batches of 128 are one step an epoch, and fifty steps teach nothing.
    """
    usual = TrainConfig.batch_size
    few = max(LEAST_BATCH, training_images // LEAST_STEPS_AN_EPOCH)
    return min(usual, 1 << (few.bit_length() - 1))


AUTHORS_DECAY = (0.96, 2000, 1e-6)
"""The published code's schedule: this factor every so many steps, smoothly, down to this rate."""
AUTHORS_RECONSTRUCTION_WEIGHT = 0.01
"""The published code's loss ratio. It halves the margin loss and takes its mean over the ten classes, where
the paper has a sum; beside a twentieth of the margin loss, 0.0005 weighs as much as 0.01 beside the whole."""

TWEAK_RANGE = (-0.25, 0.25)
"""Smallest and largest change of one digit capsule dimension in figure 4."""
TWEAK_STEP = 0.05
