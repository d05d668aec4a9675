"""The paper's baseline: a convolutional network without capsules, of 35.4 million parameters for MNIST."""

import torch
from torch import Tensor, nn

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
        """Pictures as bytes, (B, H, W[, 3]) uint8 -> logits of the classes, (B, K)."""
        logits: Tensor = self.head(self.layers(as_channels(images)).float())
        return logits

    def probabilities(self, images: Tensor) -> Tensor:
        """(B, K), which sum to one."""
        return torch.softmax(self(images), dim=-1)
