"""The rows' settings train the networks that they are for."""

import pytest
import torch

from training import compose
from training.compose import LAYOUTS
from training.config import warm_up_steps
from training.data import DIGITS, Dataset
from training.experiments import ROWS
from training.networks import build
from training.train import losses

CAPSULES = [name for name, row in ROWS.items() if row.model.get("architecture", "capsnet") == "capsnet"]


def dataset(name: str, images: torch.Tensor) -> Dataset:
    """These images of 28x28 pixels, of one class after the other, laid out as this data set's."""
    labels = torch.arange(len(images)) % 10
    return Dataset(name, DIGITS, images, labels, {}, layout=LAYOUTS.get(name, "plain"))


FIRST = {ROWS[name].dataset: name for name in reversed(CAPSULES)}
"""Of each data set, the first row."""


@pytest.mark.parametrize("name", [*FIRST.values(), "shared-weights"])
def test_first_steps_leave_the_capsules_room(name: str) -> None:
    """A first step on a data set does not make all capsules as long as they can be, where they would stay.

    Adam's first step moves every weight by the whole rate, and the more capsules there are below, the
    further that moves their sum; the more of them share a matrix, likewise.
    """
    row = ROWS[name]
    images = torch.zeros(40, 28, 28, dtype=torch.uint8)
    for label, image in enumerate(images):
        image[4 + label % 10 : 14 + label % 10, 8:20] = 200
    digits = dataset(row.dataset, images)
    config = row.train_config()
    torch.manual_seed(0)
    network = build(row.model_config(digits.classes, compose.frame(digits))).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
    composed = compose.composer(digits, config.max_shift, strong=False)
    batch = composed(torch.arange(4), torch.Generator().manual_seed(0))
    for step in range(3):
        optimizer.param_groups[0]["lr"] = config.learning_rate_at(step, 50_000)
        lengths, margin, reconstruction = losses(network, batch)
        optimizer.zero_grad()
        (margin + config.reconstruction_weight * reconstruction).mean().backward()
        optimizer.step()
    assert lengths.mean() < 0.9


@pytest.mark.parametrize("name", CAPSULES)
def test_a_row_begins_as_its_network_needs(name: str) -> None:
    """Every row of capsules rises as `make train` would for a network of its size."""
    row = ROWS[name]
    digits = dataset(row.dataset, torch.zeros(1, 28, 28, dtype=torch.uint8))
    model = row.model_config(digits.classes, compose.frame(digits))
    assert row.train_config().warm_up_steps == warm_up_steps(model)
