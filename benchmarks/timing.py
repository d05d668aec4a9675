"""Take turns, and report medians."""

import statistics
import time
from collections.abc import Callable, Mapping

CONVOLUTIONS = "the two convolutions alone"
"""The task that bounds a network's speed, as tables name it."""
TURN = 0.05
"""Seconds that a turn lasts at least: the next task finds the caches full of the last one's data."""


def take_turns(tasks: Mapping[str, Callable[[], object]], seconds: float, least: int = 3) -> dict[str, float]:
    """Median seconds of each task; in every round each has a turn, so that a busy moment hits all alike.

    Args:
        seconds: rounds begin until this time is over, but at least `least` of them.
    """
    times: dict[str, list[float]] = {name: [] for name in tasks}
    repeats = {}
    for name, task in tasks.items():
        task()  # the first run allocates
        repeats[name] = max(1, round(TURN / _seconds(task, 1)))
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < least or time.perf_counter() < end:
        for name, task in tasks.items():
            times[name].append(_seconds(task, repeats[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def _seconds(task: Callable[[], object], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        task()
    return (time.perf_counter() - began) / repeats
