"""The training loop: shuffled, shifted images in; checkpoints, a log and the final test error out."""

import json
import math
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.tensorboard.writer import SummaryWriter
from tqdm import tqdm

from training import checkpoint as checkpoints
from training.baseline import BaselineCNN
from training.captured import CapturedStep, Step
from training.checkpoint import Checkpoint
from training.compose import Batch, Compose, as_seen, composer
from training.config import Device, ModelConfig, TrainConfig
from training.data import Dataset, hold_out
from training.efficient import momentum
from training.evaluate import evaluate
from training.losses import margin_loss, mistaken, named, reconstruction_loss
from training.model import length, scale
from training.networks import Network, build
from training.parallel import Processes, processes
from training.precision import convolutions_in, resolve_precision
from training.predictor import REBUILT_TOLERANCE, OnnxPredictor, TorchPredictor, difference
from training.start import Start

RESULT_FILE = "result.json"
LOG_EVERY = 50
"""Steps between two looks at the loss; each look waits for the device."""


class TrainingError(Exception):
    """A run that cannot go on; the message says why and what to change."""


@dataclass(frozen=True)
class _Run:
    """What all epochs share."""

    network: Network
    optimizer: torch.optim.Optimizer
    generators: dict[str, torch.Generator]
    config: TrainConfig
    team: Processes


def train(
    dataset: Dataset,
    model_config: ModelConfig,
    config: TrainConfig,
    output: Path,
    *,
    load_test: Callable[[], Dataset],
    start: Start | None = None,
    resume: bool = False,
    after_epoch: Callable[[Checkpoint], None] = lambda _: None,
) -> Checkpoint:
    """Train a network on `dataset`, less the held-out validation images, into the folder `output`.

    `output` receives `checkpoint.pt` after each epoch, TensorBoard events, and at the end of the last
    epoch `result.json` with the error on the test images, which are loaded and looked at only then.

    Under `torchrun`, `batch_size` is that of all processes together; the first of them writes the files.

    Args:
        start: weights to begin with, instead of random ones.
        resume: go on from the checkpoint in `output`. The result is the same, to the last bit on one
            machine with as many threads, as if the run had not been interrupted.
        after_epoch: told of each epoch whose checkpoint is written.

    Raises:
        TrainingError: for a device that is not there, a file in the place of `output`, an existing run
            without `resume`, weights to begin with that do not fit, or a loss that is no longer a number.
        CheckpointError: if the checkpoint to resume from is damaged or was made with other settings.
    """
    device = resolve_device(config.device)
    # What `auto` came to is part of the run: a resumed run must not change it, and the manifest names it.
    config = replace(config, device=device.type, precision=resolve_precision(config.precision, device))
    if output.exists() and not output.is_dir():
        raise TrainingError(f"{output} is a file; choose another --output, the folder of a run")
    path = output / checkpoints.CHECKPOINT_FILE
    if path.exists() and not resume:
        raise TrainingError(f"{path} exists; add --resume to go on with it, or choose another --output")
    if not path.exists() and (output / RESULT_FILE).exists():
        raise TrainingError(f"{output / RESULT_FILE} is of another run; choose another --output")
    rest, validation = hold_out(dataset, config.validation_images, config.seed)
    with processes(device) as team:
        run = _Run(
            *begin(model_config, config, start, device),
            generators={
                "order": torch.Generator().manual_seed(config.seed),
                "shift": torch.Generator(device).manual_seed(config.seed),
            },
            config=config,
            team=team,
        )
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
        steps = config.steps_in_epoch(len(rest)) * config.epochs
        _settle_normalisation(run, len(rest), steps)
        if resume and path.exists():
            state = _resume(run, path, state)
        if team.first:
            print(
                f"Training on {len(rest):,} images of {dataset.name} ({len(validation):,} held out), "
                f"{sum(p.numel() for p in run.network.parameters()):,} parameters, "
                f"{config.device} in {config.precision}.",
                flush=True,
            )
            if (rise := config.rise(steps)) > steps:
                print(
                    f"note: the learning rate rises over {rise} steps, and this run has {steps}", flush=True
                )
        _require_alike(run)
        if state.epoch < config.epochs:
            _train_epochs(run, rest, as_seen(validation), state, path, after_epoch)
        if team.first and not (output / RESULT_FILE).exists():
            _write_result(run.network, state, load_test(), output)
    return state


def begin(
    model_config: ModelConfig, config: TrainConfig, start: Start | None, device: torch.device
) -> tuple[Network, torch.optim.Optimizer]:
    """A network with its first weights, and what will change them."""
    torch.manual_seed(config.seed)
    network = build(model_config)
    if start is not None:
        _begin_with(network, start)
    network.to(device)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):  # and nothing else: other weights with four axes are no images
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # missing in its types
    on_gpu = device.type == "cuda"
    # A captured step reads the rate where it lies.
    rate = torch.tensor(config.learning_rate, device=device) if on_gpu else config.learning_rate
    return network, torch.optim.Adam(network.parameters(), lr=rate, fused=True, capturable=on_gpu)


def _resume(run: _Run, path: Path, new: Checkpoint) -> Checkpoint:
    """Put `run` where the checkpoint at `path` left it, which must be of the settings of `new`."""
    saved = checkpoints.read(path)
    # Settings that a checkpoint of older code does not mention had their defaults.
    checkpoints.require_same(path, saved.shape().as_dict(), new.model_config)
    checkpoints.require_same(path, saved.settings().as_dict(), new.train_config)
    checkpoints.require_same(path, saved.dataset_checksums, new.dataset_checksums)
    for name in ("dataset", "start"):
        checkpoints.require_same(path, {name: getattr(saved, name)}, {name: getattr(new, name)})
    if saved.epoch < run.config.epochs and new.code_revision not in saved.code_revision.split(", "):
        saved.code_revision += f", {new.code_revision}"
    run.network.load_state_dict(saved.model)
    _restore(run.optimizer, saved.optimizer)
    for name, generator in run.generators.items():
        generator.set_state(saved.generators[name])
    if run.team.first:
        print(f"Resuming {path} after epoch {saved.epoch} of {run.config.epochs}.")
    return saved


def _restore(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Take over what was learnt, but not how a step is made, which older code had otherwise."""
    own = [{name: group[name] for name in ("lr", "capturable")} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, kept in zip(optimizer.param_groups, own, strict=True):
        group.update(kept)


def _require_alike(run: _Run) -> None:
    """Raise `TrainingError` for what several processes would do otherwise than one."""
    on_cpu = next(run.network.parameters()).device.type == "cpu"
    normed = any(isinstance(module, nn.BatchNorm2d) for module in run.network.modules())
    if run.team.count > 1 and on_cpu and normed:
        raise TrainingError(
            "this architecture normalises over the batch, which PyTorch shares between processes on GPUs "
            "alone; train it in one process, or on GPUs"
        )


def _settle_normalisation(run: _Run, images: int, steps: int) -> None:
    """Choose how fast the statistics of batches are forgotten in a run of so many steps.

    Raises `TrainingError` for a batch that has a single value of each channel.
    """
    normed = [module for module in run.network.modules() if isinstance(module, nn.BatchNorm2d)]
    batch_size = run.config.batch_size
    if normed and run.network.config.grid == (1, 1) and 1 in (batch_size, images % batch_size):
        raise TrainingError(
            f"{images:,} images in batches of {batch_size} leave one of a single image, and images this "
            "small are normalised over the batch alone; choose another --batch-size"
        )
    for module in normed:
        module.momentum = momentum(steps)


def _begin_with(network: Network, start: Start) -> None:
    """Give `network`, which lies on the CPU, the weights of one of the same settings."""

    def refusal(reason: str) -> TrainingError:
        return TrainingError(
            f"the weights of {start.source} are of another network, {start.config}, than the one to train, "
            f"{network.config}: its image size, classes and settings must be the same ({reason})"
        )

    wanted, found = (
        # Classes may have other names, and gradients are of how it learns.
        {**config.as_dict(), "classes": len(config.classes), "routing_gradients": None}
        for config in (network.config, start.config)
    )
    if start.exported is not None:
        # What none of its files tells; see below.
        found["scaled_votes"] = wanted["scaled_votes"]
        if network.config.grid == (1, 1):
            found["shared_weights"] = wanted["shared_weights"]
    for name, value in wanted.items():
        if found[name] != value:
            raise refusal(f"{name} is {found[name]}, expected {value}")
    wanted, found = (
        # Without the count of normalised batches, which no graph holds and nothing here reads.
        {name: tuple(w.shape) for name, w in weights.items() if not name.endswith("num_batches_tracked")}
        for weights in (network.state_dict(), start.weights)
    )
    for name in {**wanted, **found}:
        if wanted.get(name) != found.get(name):
            raise refusal(f"{name} has shape {found.get(name, 'none')}, expected {wanted.get(name, 'none')}")
    network.load_state_dict(start.weights)
    if start.exported is not None:
        apart = difference(OnnxPredictor(start.exported), TorchPredictor(network.eval()))
        network.train()
        if not apart <= REBUILT_TOLERANCE:
            raise refusal(f"its graph answers otherwise, by {apart:.2g}: scaled_votes must be as they were")


def _train_epochs(
    run: _Run,
    training: Dataset,
    validation: Dataset,
    state: Checkpoint,
    path: Path,
    after_epoch: Callable[[Checkpoint], None],
) -> None:
    """Train the epochs that `state` still lacks, and save it after each."""
    network, config = run.network, run.config
    device = next(network.parameters()).device
    training = replace(training, images=training.images.to(device), labels=training.labels.to(device))
    compose = composer(training, config.max_shift, strong=config.augmentation == "strong")
    totals = torch.zeros(3, device=device)
    update = step_of(run.team.join(network), run.optimizer, config, totals, run.team)
    steps = config.steps_in_epoch(len(training))
    board = SummaryWriter(path.parent, purge_step=state.epoch * steps) if run.team.first else None
    try:
        for epoch in range(state.epoch, config.epochs):
            began = time.monotonic()
            row = _train_epoch(run, update, totals, compose, len(training), epoch, board)
            row["seconds"] = time.monotonic() - began
            if board is None:
                continue
            if len(validation):
                row["validation_error"] = evaluate(TorchPredictor(network.eval()), validation).error
                # At the epoch's last step: one later, a resumed run would purge it.
                board.add_scalar("error/validation", row["validation_error"], (epoch + 1) * steps - 1)
            state.epoch = epoch + 1
            state.history.append(row)
            state.model = network.state_dict()
            state.optimizer = run.optimizer.state_dict()
            state.generators = {name: generator.get_state() for name, generator in run.generators.items()}
            checkpoints.save(state, path)
            figures = ", ".join(f"{k} {v:.5g}" for k, v in row.items())
            print(f"epoch {epoch + 1}/{config.epochs}: {figures}", flush=True)  # to a log as well
            after_epoch(state)
    finally:
        if board is not None:
            board.close()


def step_of(
    joined: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    totals: Tensor,
    team: Processes,
) -> Step:
    """One step of the optimizer, by this process's part of a batch of so many images; captured on a GPU.

    It adds to `totals` (classification loss, reconstruction loss, mistakes), and gives the loss, and the
    mean of either part of it.
    """

    def update(batch: Batch, whole: int) -> tuple[Tensor, Tensor, Tensor]:
        scores, margin, reconstruction = losses(joined, batch)
        total = margin + config.reconstruction_weight * reconstruction
        # The mean over the whole batch: the gradients of the processes will be averaged.
        loss = total.sum() / whole * team.count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            mistakes = mistaken(named(scores, batch.labels), batch.labels).sum()
            totals.add_(torch.stack([margin.sum(), reconstruction.sum(), mistakes]))
            return loss.detach(), margin.mean(), reconstruction.mean()

    return CapturedStep(update) if totals.is_cuda and team.count == 1 else update


def _train_epoch(
    run: _Run,
    update: Step,
    totals: Tensor,
    compose: Compose,
    images: int,
    epoch: int,
    board: SummaryWriter | None,
) -> dict[str, float]:
    """One pass over the images in random order; returns the mean losses and the training error.

    Every process draws the whole batch, so that each sees the same random numbers as a single one would, and
    goes on with its part.
    """
    network, config, team = run.network, run.config, run.team
    device = next(network.parameters()).device
    steps = config.steps_in_epoch(images)
    order = torch.randperm(images, generator=run.generators["order"]).to(device)
    totals.zero_()
    network.train()
    with (
        convolutions_in(network, config.precision),
        tqdm(
            order.split(config.batch_size),
            desc=f"epoch {epoch + 1}/{config.epochs}",
            leave=False,
            disable=None if team.first else True,  # None: where nobody watches a terminal
        ) as bar,
    ):
        for step, indices in enumerate(bar, start=epoch * steps):
            rate = config.learning_rate_at(step, steps * config.epochs)
            _set_rate(run.optimizer, rate)
            batch = compose(indices, run.generators["shift"]).part(team.part(len(indices)))
            # Dropout draws from a generator that is not saved.
            torch.manual_seed(((config.seed * 1_000_003 + step) * team.count + team.rank) % 2**64)
            loss, margin, reconstruction = update(batch, len(indices))
            if step % LOG_EVERY == 0:
                value = loss.item()
                _require_finite(value, step, config)
                bar.set_postfix(loss=f"{value:.4f}")
                if board is not None:
                    board.add_scalar("loss/total", value, step)
                    board.add_scalar(f"loss/{classification(network)}", margin, step)
                    board.add_scalar("loss/reconstruction", reconstruction, step)
                    board.add_scalar("learning_rate", rate, step)
    margin_mean, reconstruction_mean, error = (team.add(totals) / images).tolist()
    # Nothing that is not a number may reach the checkpoint, which would keep it for ever.
    weights = sum(parameter.detach().sum().item() for parameter in network.parameters())
    _require_finite(margin_mean + reconstruction_mean + weights, (epoch + 1) * steps - 1, config)
    return {
        f"{classification(network)}_loss": margin_mean,
        "reconstruction_loss": reconstruction_mean,
        "training_error": 100 * error,
    }


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def classification(network: Network) -> str:
    """The name of the loss that teaches `network` the classes."""
    return "cross_entropy" if isinstance(network, BaselineCNN) else "margin"


def losses(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of the classes (B, K), and for each image, (B,), the losses of classifying and of drawing it.

    A network without capsules learns by cross entropy, and draws nothing.
    """
    plain = getattr(network, "module", network)  # DDP keeps the network in `module`
    if isinstance(plain, BaselineCNN):
        logits = network(batch.images)
        return logits, plain.loss(logits, batch.labels), torch.zeros_like(logits[:, 0])
    capsules, reconstructions = network(batch.images, batch.labels)
    lengths = length(capsules)
    drawn = reconstruction_loss(reconstructions, scale(batch.targets))
    return lengths, margin_loss(lengths, batch.labels), drawn


def _require_finite(value: float, step: int, config: TrainConfig) -> None:
    if not math.isfinite(value):
        raise TrainingError(
            f"the loss or the weights are {value} by step {step}; "
            f"try a smaller --learning-rate than {config.learning_rate}"
        )


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where PyTorch sees it, otherwise the CPU; a named device must be there.

    CUDA is told to be repeatable, and exact where fp32 is asked for.
    """
    if name not in get_args(Device):
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


def _write_result(network: Network, state: Checkpoint, test: Dataset, output: Path) -> None:
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
    write_json(output / RESULT_FILE, result)
    print(f"test error {evaluation.error:.2f} % ({evaluation.mistakes} of {evaluation.images})")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace `path` in one step.

    Raises:
        OSError: if it cannot be written; names it.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:  # a full disk names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
