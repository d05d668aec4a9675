"""Tweaks and sweeps move the dimensions that they name and nothing else."""

import numpy as np
import pytest

from service.tweaks import Tweak, apply_tweaks, default_deltas, sweep_capsules

CAPSULES = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_a_delta_adds_and_a_value_replaces_in_order() -> None:
    """Tweaks are done one after another to the chosen capsule alone; the input stays as it was."""
    tweaks = [Tweak(0, delta=0.5), Tweak(2, value=9), Tweak(2, delta=-1), Tweak(0, delta=0.5)]
    np.testing.assert_array_equal(apply_tweaks(CAPSULES, 1, tweaks), [[0, 1, 2], [4, 4, 8]])
    np.testing.assert_array_equal(CAPSULES, np.arange(6).reshape(2, 3))


def test_a_value_of_zero_is_a_value() -> None:
    """Setting a dimension to 0 sets it."""
    assert apply_tweaks(CAPSULES, 0, [Tweak(2, value=0.0)])[0, 2] == 0


def test_a_sweep_moves_one_dimension_at_a_time() -> None:
    """Rows run over the deltas of the first dimension, then of the next."""
    swept = sweep_capsules(CAPSULES, 1, [0, 2], [-1, 1])
    np.testing.assert_array_equal(swept[:, 1], [[2, 4, 5], [4, 4, 5], [3, 4, 4], [3, 4, 6]])
    np.testing.assert_array_equal(swept[:, 0], np.tile(CAPSULES[0], (4, 1)))
    assert swept.dtype == np.float32


def test_the_papers_deltas() -> None:
    """-0.25 … 0.25 by 0.05 are eleven deltas with 0 in the middle."""
    assert default_deltas((-0.25, 0.25), 0.05) == pytest.approx(np.linspace(-0.25, 0.25, 11))
    assert default_deltas((-0.25, 0.25), 0.05)[5] == 0


def test_a_step_that_binary_cannot_hold_reaches_the_end() -> None:
    """-0.3 … 0.3 by 0.1 are seven deltas, though 0.6 divided by 0.1 is a little less than six."""
    assert default_deltas((-0.3, 0.3), 0.1) == [-0.3, -0.2, -0.1, 0, 0.1, 0.2, 0.3]
