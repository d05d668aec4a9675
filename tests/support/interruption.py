"""A training run that somebody interrupts."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from training import train as training
from training.losses import margin_loss


@contextmanager
def interrupted_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Interrupt what trains in here at its `step`th step, counted from 1; it must get so far."""
    steps = itertools.count(1)

    def interrupted(*arguments: torch.Tensor) -> torch.Tensor:
        if next(steps) == step:
            raise KeyboardInterrupt
        return margin_loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "margin_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            yield
