from typing import Any

import pytest

from training.config import ModelConfig, TrainConfig

DIGITS = tuple("0123456789")


def test_papers_grid() -> None:
    """A 28x28 picture gives the paper's 32 groups of 6x6 primary capsules."""
    config = ModelConfig(classes=DIGITS)
    assert config.grid == (6, 6)
    assert config.primary_count == 32 * 36


@pytest.mark.parametrize(("size", "grid"), [((17, 17), (1, 1)), ((32, 32), (8, 8)), ((40, 28), (12, 6))])
def test_grid_is_computed(size: tuple[int, int], grid: tuple[int, int]) -> None:
    """The grid follows from the picture's height and width."""
    assert ModelConfig(classes=DIGITS, height=size[0], width=size[1]).grid == grid


def test_too_small_a_picture() -> None:
    """A picture too small for any primary capsule is refused, with the smallest size that is not."""
    with pytest.raises(ValueError, match=r"16x28 pixels leave no primary capsules.*at least 17x17"):
        ModelConfig(classes=DIGITS, height=16)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"channels": 2}, "2 channels, expected 1"),
        ({"classes": ("one",)}, "1 classes, expected at least 2"),
        ({"routing_iterations": 0}, "routing_iterations is 0"),
    ],
)
def test_impossible_settings(setting: dict[str, object], message: str) -> None:
    """A shape that cannot be built is refused where it is written down."""
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict({"classes": DIGITS, **setting})


def test_round_trip() -> None:
    """A shape survives being stored as plain values, lists in place of tuples included."""
    config = ModelConfig(classes=DIGITS, width=40, decoder_units=(7, 9))
    plain = {key: list(v) if isinstance(v, tuple) else v for key, v in config.as_dict().items()}
    assert ModelConfig.from_dict(plain) == config


def test_unknown_setting() -> None:
    """A setting that this code does not know is named, not ignored."""
    with pytest.raises(ValueError, match=r"unknown settings \['dropout'\]"):
        ModelConfig.from_dict({"classes": DIGITS, "dropout": 0.5})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"epochs": 0}, "epochs is 0, expected at least 1"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"seed": 2**63}, "seed is 9223372036854775808, expected a whole number from 0"),
        ({"max_shift": -1}, "max_shift is -1, expected at least 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, expected a positive number"),
        ({"final_learning_rate": float("nan")}, "final_learning_rate is nan"),
        ({"reconstruction_weight": -1.0}, "reconstruction_weight is -1.0"),
    ],
)
def test_impossible_runs(setting: dict[str, Any], message: str) -> None:
    """A run that cannot work is refused before it begins."""
    with pytest.raises(ValueError, match=message):
        TrainConfig(**setting)
