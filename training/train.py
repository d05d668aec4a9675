"""The training loop: shuffled, shifted pictures in; checkpoints, a log and the final test error out."""

import json
import math
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.tensorboard.writer import SummaryWriter
from tqdm import tqdm

from training import checkpoint as checkpoints
from training.checkpoint import Checkpoint
from training.config import ModelConfig, TrainConfig
from training.data import Dataset, hold_out, random_shift
from training.evaluate import evaluate
from training.losses import margin_loss, reconstruction_loss
from training.model import CapsNet, length, scale
from training.precision import convolutions_in, resolve_precision
from training.predictor import TorchPredictor
from training.start import Start

RESULT_FILE = "result.json"
LOG_EVERY = 50
"""Steps between two looks at the loss; each look waits for the device."""


class TrainingError(Exception):
    """A run that cannot go on; the message says why and what to change."""


def train(
    dataset: Dataset,
    model_config: ModelConfig,
    config: TrainConfig,
    output: Path,
    *,
    load_test: Callable[[], Dataset],
    start: Start | None = None,
    resume: bool = False,
) -> Checkpoint:
    """Train a network on `dataset`, less the held-out validation images, into the folder `output`.

    `output` receives `checkpoint.pt` after each epoch, TensorBoard events, and at the end of the last
    epoch `result.json` with the error on the test images, which are loaded and looked at only then.

    Args:
        start: weights to begin with, instead of random ones.
        resume: go on from the checkpoint in `output`. The result is the same, to the last bit on one
            machine with as many threads, as if the run had not been interrupted.

    Raises:
        TrainingError: for a device that is not there, an existing run without `resume`, weights to begin
            with that do not fit, or a loss that is no longer a number.
        CheckpointError: if the checkpoint to resume from is damaged or was made with other settings.
    """
    device = resolve_device(config.device)
    # What `auto` came to is part of the run: a resumed run must not change it, and the manifest names it.
    config = replace(config, device=device.type, precision=resolve_precision(config.precision, device))
    path = output / checkpoints.CHECKPOINT_FILE
    if path.exists() and not resume:
        raise TrainingError(f"{path} exists; add --resume to go on with it, or choose another --output")
    if not path.exists() and (output / RESULT_FILE).exists():
        raise TrainingError(f"{output / RESULT_FILE} is of another run; choose another --output")
    rest, validation = hold_out(dataset, config.validation_images, config.seed)
    torch.manual_seed(config.seed)
    network = CapsNet(model_config)
    if start is not None:
        _begin_with(network, start)
    network.to(device)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):  # and nothing else: other weights with four axes are no images
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # missing in its types
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate, fused=True)
    generators = {
        "order": torch.Generator().manual_seed(config.seed),
        "shift": torch.Generator(device).manual_seed(config.seed),
    }
    state = Checkpoint(
        model_config=model_config.as_dict(),
        train_config=config.as_dict(),
        dataset=dataset.name,
        dataset_checksums=dataset.checksums,
        training_images=len(rest),
        code_revision=code_revision(),
        epoch=0,
        model={},
        optimizer={},
        generators={},
        history=[],
        start=None if start is None else start.origin(),
    )
    if resume and path.exists():
        saved = checkpoints.read(path)
        checkpoints.require_same(path, saved.model_config, state.model_config)
        checkpoints.require_same(path, saved.train_config, state.train_config)
        checkpoints.require_same(path, saved.dataset_checksums, state.dataset_checksums)
        checkpoints.require_same(path, {"start": saved.start}, {"start": state.start})
        network.load_state_dict(saved.model)
        optimizer.load_state_dict(saved.optimizer)
        for name, generator in generators.items():
            generator.set_state(saved.generators[name])
        state = saved
        print(f"Resuming {path} after epoch {state.epoch} of {config.epochs}.")
    print(
        f"Training on {len(rest):,} images of {dataset.name} ({len(validation):,} held out), "
        f"{sum(p.numel() for p in network.parameters()):,} parameters, {config.device} in {config.precision}."
    )

    if state.epoch < config.epochs:
        _train_epochs(network, optimizer, generators, rest, validation, config, state, path)
    if not (output / RESULT_FILE).exists():
        _write_result(network, state, load_test(), output)
    return state


def _begin_with(network: CapsNet, start: Start) -> None:
    try:
        network.load_state_dict(start.weights)
    except RuntimeError as error:
        raise TrainingError(
            f"the weights of {start.source} are of another network than the one to train: its image size, "
            "classes and settings must be the same. An exported network of a few thousand weights has lost "
            f"the names of some: start from the run's checkpoint. ({error})"
        ) from error


def _train_epochs(
    network: CapsNet,
    optimizer: torch.optim.Optimizer,
    generators: dict[str, torch.Generator],
    training: Dataset,
    validation: Dataset,
    config: TrainConfig,
    state: Checkpoint,
    path: Path,
) -> None:
    """Train the epochs that `state` still lacks, and save it after each."""
    device = next(network.parameters()).device
    images, labels = training.images.to(device), training.labels.to(device)
    steps = math.ceil(len(labels) / config.batch_size)
    with SummaryWriter(path.parent, purge_step=state.epoch * steps) as board:
        for epoch in range(state.epoch, config.epochs):
            began = time.monotonic()
            row = _train_epoch(network, optimizer, images, labels, config, generators, epoch, board)
            row["seconds"] = time.monotonic() - began
            if len(validation):
                row["validation_error"] = evaluate(TorchPredictor(network), validation).error
                # At the epoch's last step: one later, a resumed run would purge it.
                board.add_scalar("error/validation", row["validation_error"], (epoch + 1) * steps - 1)
            state.epoch = epoch + 1
            state.history.append(row)
            state.model = network.state_dict()
            state.optimizer = optimizer.state_dict()
            state.generators = {name: generator.get_state() for name, generator in generators.items()}
            checkpoints.save(state, path)
            print(f"epoch {epoch + 1}/{config.epochs}: " + ", ".join(f"{k} {v:.5g}" for k, v in row.items()))


def _train_epoch(
    network: CapsNet,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    config: TrainConfig,
    generators: dict[str, torch.Generator],
    epoch: int,
    board: SummaryWriter,
) -> dict[str, float]:
    """One pass over the images in random order; returns the mean losses and the training error."""
    steps = math.ceil(len(labels) / config.batch_size)
    order = torch.randperm(len(labels), generator=generators["order"]).to(images.device)
    totals = torch.zeros(3, device=images.device)  # margin loss, reconstruction loss, mistakes
    network.train()
    with (
        convolutions_in(network, config.precision),
        tqdm(order.split(config.batch_size), desc=f"epoch {epoch + 1}/{config.epochs}", leave=False) as bar,
    ):
        for step, batch in enumerate(bar, start=epoch * steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step, steps * config.epochs)
            x, y = random_shift(images[batch], config.max_shift, generators["shift"]), labels[batch]
            capsules, reconstructions = network(x, y)
            lengths = length(capsules)
            margin = margin_loss(lengths, y)
            reconstruction = reconstruction_loss(reconstructions, scale(x))
            loss = (margin + config.reconstruction_weight * reconstruction).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                totals += torch.stack(
                    [margin.sum(), reconstruction.sum(), (lengths.argmax(dim=-1) != y).sum()]
                )
            if step % LOG_EVERY == 0:
                value = loss.item()
                _require_finite(value, step, config)
                bar.set_postfix(loss=f"{value:.4f}")
                board.add_scalar("loss/total", value, step)
                board.add_scalar("loss/margin", margin.mean(), step)
                board.add_scalar("loss/reconstruction", reconstruction.mean(), step)
                board.add_scalar("learning_rate", optimizer.param_groups[0]["lr"], step)
    margin_mean, reconstruction_mean, mistakes = (totals / len(labels)).tolist()
    # Nothing that is not a number may reach the checkpoint, which would keep it for ever.
    weights = sum(parameter.detach().sum().item() for parameter in network.parameters())
    _require_finite(margin_mean + reconstruction_mean + weights, (epoch + 1) * steps - 1, config)
    return {
        "margin_loss": margin_mean,
        "reconstruction_loss": reconstruction_mean,
        "training_error": 100 * mistakes,
    }


def _require_finite(value: float, step: int, config: TrainConfig) -> None:
    if not math.isfinite(value):
        raise TrainingError(
            f"the loss or the weights are {value} by step {step}; "
            f"try a smaller --learning-rate than {config.learning_rate}"
        )


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Exponential decay from the first step's rate to the last step's."""
    return float(
        config.learning_rate
        * (config.final_learning_rate / config.learning_rate) ** (step / max(1, steps - 1))
    )


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where PyTorch sees it, otherwise the CPU; a named device must be there.

    CUDA is told to be repeatable, and exact where fp32 is asked for.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise TrainingError(f"device is {name!r}, expected auto, cpu or cuda")
    torch.backends.cudnn.deterministic = True  # its fastest gradients add up in no fixed order
    torch.backends.cudnn.allow_tf32 = False  # which rounds to ten bits of mantissa
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainingError(
            f"device cuda was asked for, but PyTorch {torch.__version__} sees no CUDA device; "
            "install a CUDA build and a driver, or use --device cpu"
        )
    return torch.device(name)


def code_revision() -> str:
    """The commit that this code is at, with `-dirty` after it if files differ; `unknown` outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603 - fixed words
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _write_result(network: CapsNet, state: Checkpoint, test: Dataset, output: Path) -> None:
    evaluation = evaluate(TorchPredictor(network.eval()), test)
    result: dict[str, Any] = {
        "test_images": evaluation.images,
        "test_mistakes": evaluation.mistakes,
        "test_error": evaluation.error,
        "dataset": state.dataset,
        "training_images": state.training_images,
        "code_revision": state.code_revision,
        "model_config": state.model_config,
        "train_config": state.train_config,
        "start": state.start,
        "history": state.history,
    }
    partial = output / f"{RESULT_FILE}.partial"
    partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, output / RESULT_FILE)
    print(f"test error {evaluation.error:.2f} % ({evaluation.mistakes} of {evaluation.images})")
