from dataclasses import replace
from typing import Any

import pytest

from training.config import Architecture, ModelConfig, TrainConfig, batch_size, warm_up_steps

DIGITS = tuple("0123456789")


def test_papers_grid() -> None:
    """A 28x28 image gives the paper's 32 groups of 6x6 primary capsules."""
    config = ModelConfig(classes=DIGITS)
    assert config.grid == (6, 6)
    assert config.primary_count == 32 * 36


@pytest.mark.parametrize(("size", "grid"), [((17, 17), (1, 1)), ((32, 32), (8, 8)), ((40, 28), (12, 6))])
def test_grid_is_computed(size: tuple[int, int], grid: tuple[int, int]) -> None:
    """The grid follows from the image's height and width."""
    assert ModelConfig(classes=DIGITS, height=size[0], width=size[1]).grid == grid


def test_too_small_an_image() -> None:
    """An image too small for any primary capsule is refused, with the smallest size that is not."""
    with pytest.raises(ValueError, match=r"16x28 pixels leave no primary capsules.*at least 17x17"):
        ModelConfig(classes=DIGITS, height=16)


@pytest.mark.parametrize(
    ("architecture", "least"),
    [
        ("capsnet", 17),
        ("efficient-capsnet", 11),
        ("baseline-cnn", 1),
        ("multimnist-cnn", 4),
        ("affnist-cnn", 20),
    ],
)
def test_smallest_image(architecture: Architecture, least: int) -> None:
    """Of the smallest images that an architecture takes its convolutions leave one place, of less none."""
    smallest = ModelConfig(DIGITS, least, least, architecture=architecture)
    assert smallest.grid == (1, 1)
    with pytest.raises(ValueError, match=f"need at least {least}x{least}"):
        replace(smallest, width=least - 1)


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


@pytest.mark.parametrize(
    "setting",
    [
        {"shared_weights": True},
        {"routing_iterations": 7},
        {"capsule_biases": True},
        {"scaled_votes": True},
        {"routing_gradients": True},
    ],
)
@pytest.mark.parametrize("architecture", ["efficient-capsnet", "baseline-cnn"])
def test_settings_that_an_architecture_would_ignore(setting: dict[str, object], architecture: str) -> None:
    """What only the paper's routing can do is refused for networks that have none."""
    with pytest.raises(ValueError, match=f"{next(iter(setting))} is .*, but {architecture} has no such"):
        ModelConfig.from_dict({"classes": DIGITS, "architecture": architecture, **setting})
    assert ModelConfig.from_dict({"classes": DIGITS, **setting}).architecture == "capsnet"


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
        ({"warm_up_steps": -1}, "warm_up_steps is -1, expected at least 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, expected a positive number"),
        ({"final_learning_rate": float("nan")}, "final_learning_rate is nan"),
        ({"reconstruction_weight": -1.0}, "reconstruction_weight is -1.0"),
    ],
)
def test_impossible_runs(setting: dict[str, Any], message: str) -> None:
    """A run that cannot work is refused before it begins."""
    with pytest.raises(ValueError, match=message):
        TrainConfig(**setting)


def test_learning_rate_decays_exponentially() -> None:
    """The rate runs from the first to the final one, by the same factor at each step."""
    config = TrainConfig(learning_rate=1e-2, final_learning_rate=1e-4)
    rates = [config.learning_rate_at(step, 5) for step in range(5)]
    assert rates == pytest.approx([1e-2, 10**-2.5, 1e-3, 10**-3.5, 1e-4])
    assert config.learning_rate_at(0, 1) == 1e-2


def test_warm_up() -> None:
    """Over the first steps the rate rises by as much at each, to what it would have been."""
    config = TrainConfig(learning_rate=1e-2, final_learning_rate=1e-2, warm_up_steps=4)
    rates = [config.learning_rate_at(step, 40) for step in range(6)]
    assert rates == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2, 1e-2, 1e-2])


def test_a_short_run_leaves_the_rise() -> None:
    """The rise takes a tenth of a run's steps at most, or forty of them if that is more."""
    config = TrainConfig(learning_rate=1e-2, final_learning_rate=1e-2, warm_up_steps=100)
    for steps, rise in ((100, 40), (400, 40), (500, 50), (9000, 100)):
        rates = [config.learning_rate_at(step, steps) for step in range(rise + 1)]
        assert rates == pytest.approx([1e-2 * step / rise for step in range(1, rise + 1)] + [1e-2])


@pytest.mark.parametrize(
    ("shape", "steps"),
    [
        ({}, 0),
        ({"classes": DIGITS[:9]}, 100),
        ({"height": 36, "width": 36}, 100),
        ({"height": 64, "width": 64, "primary_groups": 2}, 0),
    ],
)
def test_who_warms_up(shape: dict[str, Any], steps: int) -> None:
    """The rate rises slowly for more primary capsules than the paper's, fewer classes or shared weights."""
    shape = {"classes": DIGITS, **shape}
    assert warm_up_steps(ModelConfig(**shape)) == steps
    assert warm_up_steps(ModelConfig(shared_weights=True, **shape)) == 100
    assert warm_up_steps(ModelConfig(architecture="multimnist-cnn", **shape)) == 0


def test_authors_learning_rate() -> None:
    """The authors' rate falls by 4 % every 2000 steps, whatever the run's length, down to a millionth."""
    config = TrainConfig(schedule="authors")
    assert config.learning_rate_at(0, 10) == 1e-3
    assert config.learning_rate_at(4000, 10) == pytest.approx(0.96**2 * 1e-3)
    assert config.learning_rate_at(1000, 9**9) == pytest.approx(0.96**0.5 * 1e-3)
    assert config.learning_rate_at(10**6, 10) == 1e-6


def test_unknown_words() -> None:
    """A word that is none of a setting's is refused with those that are."""
    with pytest.raises(ValueError, match="schedule is 'linear', expected one of"):
        TrainConfig.from_dict({"schedule": "linear"})
    with pytest.raises(ValueError, match="augmentation is 'none', expected one of"):
        TrainConfig.from_dict({"augmentation": "none"})
    with pytest.raises(ValueError, match="architecture is 'mlp', expected one of"):
        ModelConfig.from_dict({"classes": DIGITS, "architecture": "mlp"})


@pytest.mark.parametrize(
    ("architecture", "count"), [("capsnet", 32 * 36), ("efficient-capsnet", 16), ("baseline-cnn", 32 * 784)]
)
def test_primary_capsules_of_an_architecture(architecture: str, count: int) -> None:
    """A 28x28 image gives Efficient-CapsNet 16 primary capsules of 8 dimensions."""
    config = ModelConfig.from_dict({"classes": DIGITS, "architecture": architecture})
    assert (config.primary_count, config.primary_dimensions) == (count, 8)


def test_settings_of_an_older_checkpoint() -> None:
    """Settings that a checkpoint does not mention yet are those that it was trained with: the defaults."""
    old = {"classes": DIGITS, "routing_iterations": 3, "shared_weights": True}
    assert ModelConfig.from_dict(old) == ModelConfig(classes=DIGITS, shared_weights=True)
    assert ModelConfig(classes=DIGITS).architecture == "capsnet"
    assert not any(
        getattr(ModelConfig(classes=DIGITS), switch)
        for switch in ("capsule_biases", "scaled_votes", "routing_gradients")
    )


@pytest.mark.parametrize(
    ("training_images", "expected"),
    [(55_000, 128), (1280, 128), (1279, 64), (540, 32), (159, 8), (80, 8), (11, 8), (1, 8)],
)
def test_few_images_have_small_batches(training_images: int, expected: int) -> None:
    """However few images there are, an epoch has ten steps, or batches are as small as they usefully get."""
    assert batch_size(training_images) == expected
