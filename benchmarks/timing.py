"""Take turns, and report medians."""

import statistics
import time
from collections.abc import Callable, Mapping


def take_turns(tasks: Mapping[str, Callable[[], object]], seconds: float, least: int = 3) -> dict[str, float]:
    """Median seconds of each task; every round runs each once, so that a busy moment hits all alike.

    Args:
        seconds: rounds begin until this time is over, but at least `least` of them.
    """
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():  # the first run allocates
        task()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or time.perf_counter() < end:
        for name, task in tasks.items():
            began = time.perf_counter()
            task()
            times[name].append(time.perf_counter() - began)
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}
