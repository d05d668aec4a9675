"""The paper's convolutional networks without capsules: one for each task that it compares capsules on."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.config import ModelConfig
from training.model import as_channels

DROPOUT = 0.5
"""The paper names none."""


class BaselineCNN(nn.Module):
    """Section 5: three 5x5 convolutions of 256, 256 and 128 channels, then layers of 328 and 192 units.

    The paper does not speak of padding. With it the parameters add up to the 35.4 million that it names,
    without it to 13.3.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        wide, narrow = config.conv_channels, config.conv_channels // 2
        rows, columns = config.grid
        self.layers = nn.Sequential(
            nn.Conv2d(config.channels, wide, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(wide, wide, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(wide, narrow, 5, padding=2),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.head = nn.Sequential(
            nn.Linear(narrow * rows * columns, 328),
            nn.ReLU(),
            nn.Linear(328, 192),
            nn.ReLU(),
            nn.Dropout(DROPOUT),
            nn.Linear(192, len(config.classes)),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images as bytes, (B, H, W[, 3]) uint8 -> logits of the classes, (B, K)."""
        logits: Tensor = self.head(self.layers(as_channels(images)).float())
        return logits

    def probabilities(self, images: Tensor) -> Tensor:
        """(B, K), which sum to one; of images of several digits only their order means something."""
        return torch.softmax(self(images), dim=-1)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross entropy of each image, (B,), for labels (B,) or (B, L)."""
        if target.ndim == 1:
            return F.cross_entropy(logits, target, reduction="none")
        # All classes shown equally likely: the authors' code halves the labels in the same way.
        shares = F.one_hot(target, logits.shape[1]).sum(dim=1) / target.shape[1]
        return F.cross_entropy(logits, shares, reduction="none")


class PooledCNN(BaselineCNN):
    """Convolutions of 512 channels (9x9) and 256 (5x5), each halved by pooling, then a layer of 1024 units.

    `multimnist-cnn` is section 6's, whose parameters add up to the 24.56 million named there if its
    convolutions are padded.

    `affnist-cnn`: section 5.2 says no more of its network than that it pools, drops out, and has about as
    many parameters as the CapsNet for 40x40, which has 13.5 million. Without padding the network above has
    12.8; dropout stands before its last layer, as in section 5.
    """

    def __init__(self, config: ModelConfig) -> None:
        nn.Module.__init__(self)  # without the layers of section 5
        self.config = config
        wide, narrow = 2 * config.conv_channels, config.conv_channels
        rows, columns = config.grid
        padded = config.architecture == "multimnist-cnn"
        self.layers = nn.Sequential(
            nn.Conv2d(config.channels, wide, 9, padding=4 if padded else 0),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(wide, narrow, 5, padding=2 if padded else 0),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Sequential(
            nn.Linear(narrow * rows * columns, 1024),
            nn.ReLU(),
            nn.Identity() if padded else nn.Dropout(DROPOUT),
            nn.Linear(1024, len(config.classes)),
        )

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """As section 6 has it for labels (B, L): whether each class is there, by itself, summed over all."""
        if target.ndim == 1:
            return super().loss(logits, target)
        present = F.one_hot(target, logits.shape[1]).sum(dim=1).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, present, reduction="none").sum(dim=-1)
