"""The command line, `capsnet train|evaluate|export|visualize|…`: it reads arguments and calls the rest."""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch

from service.manifest import ManifestError, write_manifest
from training import checkpoint as checkpoints
from training import compose, data, detection, results, robustness
from training.attacks import STEPS
from training.baseline import BaselineCNN
from training.checkpoint import CheckpointError
from training.compose import SHIFTS
from training.config import (
    AUTHORS_RECONSTRUCTION_WEIGHT,
    LEAST_BATCH,
    LEAST_RISE,
    LEAST_STEPS_AN_EPOCH,
    WARM_UP_STEPS,
    Architecture,
    Augmentation,
    Device,
    ModelConfig,
    Precision,
    Schedule,
    TrainConfig,
    batch_size,
    require_seed,
    warm_up_steps,
)
from training.data import DataError, Dataset
from training.dimensions import measure_dimensions
from training.evaluate import evaluate, require_fit
from training.experiments import ROWS
from training.export import ExportError, Name, calibrate, calibration_set, export
from training.model_card import renew_meaning
from training.predictor import OnnxPredictor
from training.reproduce import RECORDS, SIZES, reproduce
from training.results import ResultsError
from training.start import read_start
from training.train import TrainingError, train, write_json
from training.trained import open_trained, read_network
from training.visualize import draw_dimensions, draw_effects, draw_pairs, draw_reconstructions, file_names

DEFAULTS = TrainConfig()
DATASET = "mnist"

# Faults of what was given or of the place it should go to, not of this program: a line says enough.
EXPECTED = (
    CheckpointError,
    DataError,
    ExportError,
    ManifestError,
    OSError,
    ResultsError,
    TrainingError,
    ValueError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the process's exit status."""
    options = parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        with _terminable():
            command(options)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        print(f"capsnet: out of memory; try a smaller --batch-size or images ({error})", file=sys.stderr)
        return 1
    except EXPECTED as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        advice = "; free some and try again (a run of training with --resume)" if full else ""
        print(f"capsnet: {error}{advice}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ncapsnet: interrupted; what was finished is on disk", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _terminable() -> Iterator[None]:
    """Make an exception of SIGTERM, so that what was begun is cleaned up."""
    if "WORLD_SIZE" in os.environ:  # torchrun's: one that waits for another would never come to raise it
        yield
        return
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)  # as a shell would report it


def _out_of_memory(error: Exception) -> bool:
    """On the CPU, PyTorch tells it from other faults by its words alone."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="capsnet", description="Train, evaluate, export and draw capsule networks (Sabour et al., 2017)."
    )
    commands = top.add_subparsers(required=True, metavar="command")
    _add_train(commands)
    _add_evaluate(commands)
    _add_export(commands)
    _add_dimensions(commands)
    _add_visualize(commands)
    _add_reproduce(commands)
    _add_results(commands)
    _add_robustness(commands)
    _add_detect(commands)
    return top


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults shown, but for those that are no value."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], None],
    summary: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary, formatter_class=_Defaults)
    command.set_defaults(command=run)
    return command


def _add_dataset(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dataset",
        choices=compose.NAMES,
        help=f"the images; multimnist, translated-mnist and affnist are made from MNIST; unset: {DATASET}",
    )
    command.add_argument(
        "--data-dir",
        type=Path,
        default=data.default_data_dir(),
        help="where the data lies; what is missing of the published sets is downloaded there. For --dataset "
        "folder: <data-dir>/train/<class>/*.png and <data-dir>/test/<class>/*.png",
    )


def _load(options: argparse.Namespace, split: data.Split) -> Dataset:
    return compose.load(options.dataset or DATASET, split, options.data_dir)


def _require_own(options: argparse.Namespace, network: Path, trained_on: str, *, always: bool = True) -> None:
    """Raise `DataError` before images are loaded that `network` was not trained on.

    Args:
        always: False to allow for those that were named.
    """
    asked = options.dataset or DATASET
    if asked != trained_on and (always or options.dataset is None):
        folder = " --data-dir <its folder>" if trained_on == "folder" else ""
        raise DataError(
            f"{network}: trained on {trained_on}, not {asked}: add --dataset {trained_on}{folder}"
        )


def _add_train(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = _command(
        commands, "train", _train, "Train a network; --resume goes on with a run that was interrupted."
    )
    _add_dataset(command)
    command.add_argument(
        "--output",
        type=Path,
        help="folder for checkpoint, TensorBoard log, result; unset: runs/<dataset>",
    )
    command.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output")
    command.add_argument(
        "--start",
        type=Path,
        help="begin with the weights of this run, checkpoint.pt or exported model folder; unset: random ones",
    )
    command.add_argument(
        "--epochs", type=int, default=DEFAULTS.epochs, help="passes over the training images"
    )
    command.add_argument(
        "--batch-size",
        type=int,
        help=f"images a step; unset: {DEFAULTS.batch_size}, or for few images so much less, {LEAST_BATCH} "
        f"at least, that an epoch has {LEAST_STEPS_AN_EPOCH} steps",
    )
    command.add_argument(
        "--learning-rate", type=float, default=DEFAULTS.learning_rate, help="Adam's rate at the first step"
    )
    command.add_argument(
        "--final-learning-rate",
        type=float,
        help="its rate at the last step; it decays exponentially in between; unset: "
        f"{DEFAULTS.final_learning_rate}, or --learning-rate if that is less",
    )
    command.add_argument(
        "--warm-up-steps",
        type=int,
        help="steps over which the rate rises to its first value, but a tenth of the run's at most, or "
        f"{LEAST_RISE}; unset: {WARM_UP_STEPS} for a capsnet that has more primary capsules "
        "for each of its classes (ten at most) than the paper's 115, or shares their weights, otherwise none",
    )
    command.add_argument(
        "--max-shift",
        type=int,
        help=f"largest random shift of an image, in pixels; unset: the paper's, {SHIFTS['plain']}, of "
        f"multimnist {SHIFTS['pairs']}, of translated-mnist {SHIFTS['canvas']}",
    )
    command.add_argument(
        "--reconstruction-weight",
        type=float,
        default=DEFAULTS.reconstruction_weight,
        help="weight of the squared reconstruction error, summed over the pixels: the more of them, the "
        "smaller it should be; 0 trains without, "
        f"{AUTHORS_RECONSTRUCTION_WEIGHT} is the ratio of the authors' published code",
    )
    command.add_argument(
        "--validation-images",
        type=int,
        help="training images held out to watch the error on; 0 trains on all of them; unset: a tenth, "
        f"and {DEFAULTS.validation_images} at most",
    )
    command.add_argument(
        "--schedule",
        choices=get_args(Schedule),
        default=DEFAULTS.schedule,
        help="authors: 4 %% less every 2000 steps, as in the authors' code, and no --final-learning-rate",
    )
    command.add_argument(
        "--augmentation",
        choices=get_args(Augmentation),
        default=DEFAULTS.augmentation,
        help="strong: turned, squeezed, shifted and partly erased instead of shifts alone; for ink on a "
        "plain dark or light ground, not for photographs",
    )
    command.add_argument(
        "--architecture",
        choices=get_args(Architecture),
        default=ModelConfig.architecture,
        help="the paper's network, a smaller successor, or one of its CNNs, which cannot be exported",
    )
    for switch, what in (
        ("--capsule-biases", "give digit capsules a bias"),
        ("--scaled-votes", "divide what primary capsules sum up by the number of their groups"),
        ("--routing-gradients", "let gradients through all routing iterations"),
    ):
        command.add_argument(
            switch,
            action="store_true",
            help=f"{what}, as the authors' published code does; for capsnet alone",
        )
    command.add_argument(
        "--routing-iterations",
        type=int,
        default=ModelConfig.routing_iterations,
        help="rounds of routing by agreement; for capsnet alone",
    )
    command.add_argument(
        "--share-weights",
        action="store_true",
        help="one transformation matrix for each group of primary capsules instead of one for each capsule; "
        "for capsnet alone",
    )
    _add_run(command)


def _add_run(command: argparse.ArgumentParser) -> None:
    """What two runs of the same settings may differ by."""
    command.add_argument(
        "--seed", type=int, default=DEFAULTS.seed, help="same seed, same machine, same weights"
    )
    command.add_argument(
        "--device",
        choices=get_args(Device),
        default=DEFAULTS.device,
        help="auto takes CUDA where there is some; cuda fails where there is none",
    )
    command.add_argument(
        "--precision",
        choices=get_args(Precision),
        default=DEFAULTS.precision,
        help="arithmetic of the convolutions; auto is bf16 on CUDA and fp32 on the CPU",
    )


def _train(options: argparse.Namespace) -> None:
    if options.augmentation == "strong" and options.max_shift is not None:
        raise ValueError(
            "--max-shift goes with --augmentation shift; strong shifts by the margin of each image"
        )
    if options.schedule == "authors" and options.final_learning_rate is not None:
        raise ValueError(
            "--final-learning-rate goes with --schedule exponential; authors takes 4 % off every 2000 steps"
        )
    final = options.final_learning_rate
    if final is None:
        final = min(DEFAULTS.final_learning_rate, options.learning_rate)
    elif final > options.learning_rate and not options.resume:  # a run from before it was refused
        raise ValueError(
            f"--final-learning-rate is {final}, expected at most --learning-rate, {options.learning_rate}: "
            "the rate decays"
        )
    dataset = _load(options, "train")
    height, width, channels = compose.frame(dataset)
    model_config = ModelConfig(
        classes=dataset.classes,
        height=height,
        width=width,
        channels=channels,
        architecture=options.architecture,
        capsule_biases=options.capsule_biases,
        scaled_votes=options.scaled_votes,
        routing_gradients=options.routing_gradients,
        routing_iterations=options.routing_iterations,
        shared_weights=options.share_weights,
    )
    held_out = options.validation_images
    if held_out is None:
        held_out = min(DEFAULTS.validation_images, len(dataset) // 10)
    train(
        dataset,
        model_config,
        TrainConfig(
            epochs=options.epochs,
            batch_size=batch_size(len(dataset) - held_out)
            if options.batch_size is None
            else options.batch_size,
            learning_rate=options.learning_rate,
            final_learning_rate=final,
            schedule=options.schedule,
            warm_up_steps=warm_up_steps(model_config)
            if options.warm_up_steps is None
            else options.warm_up_steps,
            augmentation=options.augmentation,
            max_shift=SHIFTS[dataset.layout] if options.max_shift is None else options.max_shift,
            reconstruction_weight=options.reconstruction_weight,
            validation_images=held_out,
            seed=options.seed,
            device=options.device,
            precision=options.precision,
        ),
        options.output or Path("runs", dataset.name),
        load_test=partial(_load, options, "test"),
        start=read_start(options.start) if options.start else None,
        resume=options.resume,
    )


def _add_network(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "network", type=Path, help="a run's folder, a checkpoint.pt, or an exported model folder"
    )


def _add_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = _command(commands, "evaluate", _evaluate, "Report a network's error on the test images.")
    _add_network(command)
    _add_dataset(command)
    command.add_argument("--device", choices=get_args(Device), default="auto", help="for checkpoints")


def _evaluate(options: argparse.Namespace) -> None:
    trained = open_trained(options.network, options.device)
    _require_own(options, options.network, trained.training["dataset"], always=False)
    result = evaluate(trained.predictor, _load(options, "test"))
    print(f"test error {result.error:.2f} % ({result.mistakes} of {result.images})")
    if len(result.reconstruction_errors):  # a CNN draws nothing
        print(
            f"mean reconstruction error {result.reconstruction_errors.mean():.2f} (summed squared, per image)"
        )


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = _command(
        commands, "export", _export, "Write a checkpoint as ONNX graphs with manifest and model card."
    )
    command.add_argument("checkpoint", type=Path, help="a run's folder or a checkpoint.pt")
    _add_dataset(command)
    command.add_argument("--models", type=Path, default=Path("models"), help="folder of exported models")
    command.add_argument("--name", help="the model's name; unset: its data set's")
    command.add_argument("--version", default="1", help="a whole number; the service takes the newest")


def _export(options: argparse.Namespace) -> None:
    checkpoint = checkpoints.read(options.checkpoint)
    _require_own(options, options.checkpoint, checkpoint.dataset)
    if not checkpoint.finished:
        print(f"note: this run has finished {checkpoint.epoch} of {checkpoint.train_config['epochs']} epochs")
    place = Name(options.models, options.name or checkpoint.dataset, options.version)
    manifest = export(checkpoint, place, partial(_load, options))
    print(f"{place.folder}: test error {manifest.measured.test_error:.2f} %")


def _add_dimensions(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = _command(
        commands,
        "dimensions",
        _dimensions,
        "Measure what each dimension means on training images: into the model's manifest and card, and "
        "effects.png. An export does the same.",
    )
    command.add_argument("model", type=Path, help="an exported model folder")
    _add_dataset(command)
    command.add_argument("--output", type=Path, default=Path("runs/figures"), help="folder for the picture")


def _dimensions(options: argparse.Namespace) -> None:
    predictor = OnnxPredictor(options.model)
    manifest = predictor.manifest
    _require_own(options, options.model, manifest.provenance.dataset)
    dataset = _load(options, "train")
    require_fit(predictor, compose.as_seen(data.take(dataset, torch.tensor([0]))))
    if not dataset.checksums.items() <= manifest.provenance.dataset_checksums.items():
        raise DataError(
            f"{dataset.name}: not the images that {manifest.reference} was trained on; "
            "choose those with --dataset and --data-dir"
        )
    light = manifest.image.polarity == "light_on_dark"
    found = measure_dimensions(predictor, dataset, light_on_dark=light)
    if not found:
        raise DataError(f"{dataset.name}: no image from which a dimension's meaning could be measured")
    manifest = manifest.model_copy(update={"dimensions": found})
    write_manifest(options.model, manifest)
    card = options.model / "MODEL_CARD.md"
    if card.is_file():
        card.write_text(renew_meaning(card.read_text(encoding="utf-8"), manifest), encoding="utf-8")
    options.output.mkdir(parents=True, exist_ok=True)
    draw_effects(found, options.output / "effects.png")
    print(f"the dimensions are named in {options.model}, and drawn in {options.output / 'effects.png'}")


def _add_visualize(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = _command(
        commands,
        "visualize",
        _visualize,
        "Draw reconstructions.png and, for each class, dimensions-<class>.png: what each dimension changes.",
    )
    _add_network(command)
    _add_dataset(command)
    command.add_argument("--output", type=Path, default=Path("runs/figures"), help="folder for the pictures")
    command.add_argument("--label", action="append", help="a class to draw; repeat for more (default: all)")


def _visualize(options: argparse.Namespace) -> None:
    trained = open_trained(options.network)
    if not trained.predictor.draws:
        raise DataError(f"{options.network}: a CNN without capsules draws nothing; capsnet evaluate takes it")
    _require_own(options, options.network, trained.training["dataset"], always=False)
    predictor, dataset = trained.predictor, _load(options, "test")
    require_fit(predictor, dataset)
    options.output.mkdir(parents=True, exist_ok=True)
    if dataset.digits is not None:  # a capsule's dimensions say nothing of an image of two digits
        draw_pairs(predictor, dataset, options.output / "pairs.png")
        print(f"a picture is in {options.output}")
        return
    files = file_names(dataset.classes)
    for label in options.label or dataset.classes:
        names = predictor.manifest.dimension_names(label) if isinstance(predictor, OnnxPredictor) else ()
        path = options.output / f"dimensions-{files.get(label)}.png"  # it knows the label, or refuses it
        draw_dimensions(predictor, dataset, label, path, names)
    draw_reconstructions(predictor, dataset, options.output / "reconstructions.png")
    print(f"pictures are in {options.output}")


class _Listing(_Defaults, argparse.RawDescriptionHelpFormatter):
    """Defaults shown, and a list below that keeps its lines."""


def _add_reproduce(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = _command(
        commands, "reproduce", _reproduce, "Train and test one of the published results, and keep a record."
    )
    command.formatter_class = _Listing
    command.epilog = "rows:\n" + "\n".join(f"  {name:26}{row.what}" for name, row in ROWS.items())
    command.add_argument("row", choices=ROWS, metavar="row", help="one of the rows below")
    command.add_argument(
        "--size",
        choices=SIZES,
        default="full",
        help="smoke: a few images, to see that it runs; small: a sixth of them; neither is a result",
    )
    command.add_argument("--epochs", type=int, help="passes over the training images; unset: the row's")
    command.add_argument("--resume", action="store_true", help="go on with this row's run of this seed")
    command.add_argument(
        "--data-dir", type=Path, default=data.default_data_dir(), help="where MNIST lies, or is downloaded to"
    )
    _add_run(command)


def _reproduce(options: argparse.Namespace) -> None:
    record = reproduce(
        options.row,
        ROWS[options.row],
        options.size,
        data_dir=options.data_dir,
        resume=options.resume,
        epochs=options.epochs,
        seed=options.seed,
        device=options.device,
        precision=options.precision,
    )
    print(f"recorded in {record}")


def _add_results(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    _command(commands, "results", _results, f"Write {results.TABLE} from the records in {RECORDS}.")


def _results(_: argparse.Namespace) -> None:
    text = results.document(RECORDS)
    results.TABLE.parent.mkdir(parents=True, exist_ok=True)
    results.TABLE.write_text(text, encoding="utf-8")
    print(f"wrote {results.TABLE}")


def _add_measure(command: argparse.ArgumentParser) -> None:
    """What both looks at a network's weak sides take."""
    _add_dataset(command)
    command.add_argument("--images", type=int, help="this many of the test images, evenly spread; unset: all")
    command.add_argument(
        "--output", type=Path, default=Path("runs/figures"), help="folder for the figures, JSON and PNG"
    )


def _add_robustness(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = _command(
        commands,
        "robustness",
        _robustness,
        "Measure the test error of turned, moved, noisy and pale images: robustness.json and .png.",
    )
    command.add_argument(
        "networks",
        type=Path,
        nargs="+",
        metavar="network",
        help="a run's folder, a checkpoint.pt, or an exported model folder; several are drawn together",
    )
    _add_measure(command)
    command.add_argument("--seed", type=int, default=0, help="same seed, same images")


def _robustness(options: argparse.Namespace) -> None:
    require_seed(options.seed)
    networks = [open_trained(path) for path in options.networks]
    for path, trained in zip(options.networks, networks, strict=True):
        _require_own(options, path, trained.training["dataset"], always=False)
    dataset = data.sample(_load(options, "test"), options.images)
    record = robustness.measure(networks, dataset, seed=options.seed)
    _write(record, robustness.draw, options.output, "robustness")


def _add_detect(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = _command(
        commands,
        "detect",
        _detect,
        "Measure how well images of no class and adversarial ones are found out: detection.json and .png.",
    )
    _add_network(command)
    _add_measure(command)
    command.add_argument("--attacked", type=int, default=500, help="rightly classified test images to attack")
    command.add_argument(
        "--epsilon",
        type=int,
        action="append",
        help=f"most grey levels to move a pixel by; repeat for more (unset: {detection.EPSILONS})",
    )
    command.add_argument("--steps", type=int, default=STEPS, help="of BIM; R-BIM takes twice as many")


def _detect(options: argparse.Namespace) -> None:
    trained, network = open_trained(options.network), read_network(options.network)
    if isinstance(network, BaselineCNN):
        raise DataError(f"{options.network}: a CNN without capsules draws nothing that could be compared")
    _require_own(options, options.network, trained.training["dataset"], always=False)
    dataset = data.sample(_load(options, "test"), options.images)
    if isinstance(trained.predictor, OnnxPredictor):
        calibration = trained.predictor.manifest.calibration
    else:
        run = checkpoints.read(options.network)
        calibration = calibrate(trained.predictor, *calibration_set(_load(options, "train"), run))
    others, missing = detection.outliers(dataset, options.data_dir)
    found = detection.measure(
        network,
        calibration,
        dataset,
        others,
        attacked=options.attacked,
        epsilons=options.epsilon or detection.EPSILONS,
        steps=options.steps,
    )
    record = {"network": {"name": trained.name, "training": trained.training}, "missing": missing, **found}
    for kind in missing:
        print(f"{kind} is not in {options.data_dir}, and was left out")
    _write(record, detection.draw, options.output, "detection")


def _write(
    record: dict[str, Any], draw: Callable[[dict[str, Any], Path], None], folder: Path, name: str
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", record)
    draw(record, folder / f"{name}.png")
    print(f"wrote {name}.json and {name}.png into {folder}")


if __name__ == "__main__":
    sys.exit(main())
