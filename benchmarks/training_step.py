"""One whole training step beside its two convolutions alone, in the same arithmetic; and its peak memory."""

import multiprocessing
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.nn import functional as F

from benchmarks.timing import CONVOLUTIONS, take_turns
from tests.support.status import status_of
from training.captured import WARM_UP
from training.compose import Batch
from training.config import ModelConfig, TrainConfig
from training.data import random_shift
from training.model import CapsNet, scale
from training.parallel import Processes
from training.precision import convolutions_in
from training.train import begin, resolve_device, step_of

BATCH = 128
ARITHMETICS = ("fp32", "bf16")
AT_ONCE = 20
"""Steps between two waits for a GPU, which training does not wait for either."""


def run(
    seconds: float,
    threads: int,
    config: ModelConfig | None = None,
    batch: int = BATCH,
    device_name: str = "cpu",
) -> dict[str, Any]:
    """Images per second of each, and MiB at the peak of a process that does nothing but steps.

    On a GPU the peak is of the memory that PyTorch's tensors take there.
    """
    torch.set_num_threads(threads)
    device = resolve_device(device_name)
    config = config or ModelConfig(classes=tuple("0123456789"))
    tasks = {}
    for arithmetic in ARITHMETICS:
        tasks[f"step, {arithmetic}"] = _step(config, arithmetic, batch, device)
        tasks[f"{CONVOLUTIONS}, {arithmetic}"] = _convolutions(config, arithmetic, batch, device)
    at_once = 1 if device.type == "cpu" else AT_ONCE
    medians = take_turns({name: _repeated(task, at_once, device) for name, task in tasks.items()}, seconds)
    context = multiprocessing.get_context("spawn")  # a process of its own, or the peak would be this one's
    peaks = {}
    for arithmetic in ARITHMETICS:
        with context.Pool(1) as pool:
            peaks[arithmetic] = pool.apply(_peak, (arithmetic, threads, config, batch, device_name))
    return {
        "batch": batch,
        "threads": threads,
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "images_per_second": {name: at_once * batch / median for name, median in medians.items()},
        "peak_mib": peaks,
    }


def _repeated(task: Callable[[], object], times: int, device: torch.device) -> Callable[[], None]:
    """`task` so many times, and then a wait for the device."""

    def run() -> None:
        for _ in range(times):
            task()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def _images(config: ModelConfig, batch: int, device: torch.device) -> torch.Tensor:
    return torch.randint(0, 256, (batch, *config.image_shape), dtype=torch.uint8, device=device)


def _step(config: ModelConfig, arithmetic: str, batch: int, device: torch.device) -> Callable[[], object]:
    """As the trainer makes it."""
    settings = TrainConfig()
    network, optimizer = begin(config, settings, None, device)
    learn = step_of(network, optimizer, settings, torch.zeros(3, device=device), Processes())
    images = _images(config, batch, device)
    labels = torch.arange(batch, device=device) % len(config.classes)
    generator = torch.Generator(device)

    def step() -> None:
        with convolutions_in(network, arithmetic):
            shifted = random_shift(images, settings.max_shift, generator)
            learn(Batch(shifted, labels, shifted), batch)

    return step


def _convolutions(
    config: ModelConfig, arithmetic: str, batch: int, device: torch.device
) -> Callable[[], object]:
    network = cast("CapsNet", begin(config, TrainConfig(), None, device)[0])
    first, second = network.encoder.conv, network.encoder.primary_capsules.conv
    x = scale(_images(config, batch, device)).unsqueeze(1)

    def forward_and_backward() -> None:
        with convolutions_in(network, arithmetic):
            second(F.relu(first(x))).float().sum().backward()

    return forward_and_backward


def _peak(arithmetic: str, threads: int, config: ModelConfig, batch: int, device_name: str) -> float:
    torch.set_num_threads(threads)
    device = resolve_device(device_name)
    step = _step(config, arithmetic, batch, device)
    for _ in range(WARM_UP + 2):
        step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Not getrusage's figure: that one is handed down from the parent process.
    return status_of("self", "VmHWM") / 1024
