"""A network of any architecture, from its settings."""

from training.baseline import BaselineCNN, PooledCNN
from training.config import ModelConfig
from training.efficient import EfficientCapsNet
from training.model import CapsNet

Network = CapsNet | BaselineCNN


def build(config: ModelConfig) -> Network:
    """A network with random first weights."""
    kinds: dict[str, type[Network]] = {
        "capsnet": CapsNet,
        "efficient-capsnet": EfficientCapsNet,
        "baseline-cnn": BaselineCNN,
        "multimnist-cnn": PooledCNN,
        "affnist-cnn": PooledCNN,
    }
    return kinds[config.architecture](config)
