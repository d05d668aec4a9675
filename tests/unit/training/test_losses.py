import pytest
import torch

from training.losses import margin_loss, mistaken, named, reconstruction_loss


def test_margin_loss_by_hand() -> None:
    """Each image's loss is the paper's sum over classes, worked out by hand."""
    lengths = torch.tensor([[0.5, 0.3, 0.05], [0.95, 0.0, 0.6]])
    loss = margin_loss(lengths, torch.tensor([0, 2]))
    # (0.9 - 0.5)^2 + 0.5 (0.3 - 0.1)^2 + 0, and 0.5 (0.95 - 0.1)^2 + 0 + (0.9 - 0.6)^2
    torch.testing.assert_close(loss, torch.tensor([0.16 + 0.02, 0.36125 + 0.09]))


def test_margin_loss_is_zero_within_the_margins() -> None:
    """A long capsule for the label and short ones for the rest cost nothing."""
    assert margin_loss(torch.tensor([[0.9, 0.1, 0.02]]), torch.tensor([0])).item() == pytest.approx(
        0, abs=1e-12
    )


def test_reconstruction_loss_is_a_sum() -> None:
    """The squared error is summed over the pixels of an image, not averaged: 784 times as heavy."""
    ones = torch.ones(2, 28, 28)
    torch.testing.assert_close(reconstruction_loss(ones * 0.5, ones), torch.full((2,), 784 * 0.25))


def test_reconstruction_loss_of_colour_images() -> None:
    """All three channels count."""
    assert reconstruction_loss(torch.zeros(1, 4, 4, 3), torch.ones(1, 4, 4, 3)).tolist() == [48.0]


def test_images_of_two_digits() -> None:
    """The two longest are named in ascending order; both must be right, in whatever order labelled."""
    scores = torch.tensor([[0.1, 0.5, 0.2, 0.9]]).repeat(4, 1)
    labels = torch.tensor([[1, 3], [3, 1], [3, 2], [0, 2]])
    found = named(scores, labels)
    assert found.tolist() == [[1, 3]] * 4
    assert mistaken(found, labels).tolist() == [False, False, True, True]
