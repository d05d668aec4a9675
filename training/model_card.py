"""The model card: what a person should know before using an exported network."""

import re
from collections.abc import Iterable

import numpy as np

from service.manifest import Manifest
from training.config import ModelConfig, TrainConfig
from training.dimensions import IMAGES, NOT_MEASURED
from training.evaluate import Evaluation

TEMPLATE = """\
# {name}, version {version}

A capsule network after {authors}.
It finds one of {classes} classes in a {width}x{height} {colour} image ({polarity}), describes what it
found by a {dimensions}-dimensional capsule, and draws the image again from that capsule.

## Figures
Of the exported graphs, run by ONNX Runtime unless a row says otherwise:

{figures}

Reconstruction error is the summed squared error over the image, both sides in [0, 1]; the margin is how
much longer the longest capsule is than the next. The bounds come from {calibration_source}.

{classes_table}

## What it takes for one of its own

An image is flagged as not in distribution if its reconstruction error or its margin is beyond the bound.
Of the test images few should be; of images that are of no class, drawn by chance (`training/outliers.py`),
many:

{detection}

{meaning}
## How it was made

{recipe}

{tested}

## Limits
{exceptions}- It sees one object on a plain background. An image with none, or with two, still gets a class;
  `in_distribution` is the only hint that something is wrong, and an imperfect one.
- A capsule's length says how present a class is. It is not a probability, and the lengths do not sum
  to one.
- What a dimension stands for was found by the network; it differs from class to class and from one
  training run to the next.
"""

RECIPE = "## How it was made\n"
MEANING = "## What the dimensions mean\n"

AUTHORS = {
    "capsnet": "Sabour, Frosst and Hinton, *Dynamic Routing Between Capsules* (NIPS 2017)",
    "efficient-capsnet": "Mazzia, Salvetti and Chiaberge, *Efficient-CapsNet: Capsule Network with\n"
    "Self-Attention Routing* (2021)",
}

REMARKS = {
    "fp32": " for CPUs",
    "fp16": ", computed by ONNX's reference implementation and rounded as on a GPU",
}
"""What else there is to say of a variant: in fp32 what it is for (docs/decisions/0020), in fp16 what computed
its figures, where it was not ONNX Runtime (docs/decisions/0050)."""

CALIBRATION_SOURCES = {
    "held-out": "training images that were held out",
    "training": "training images that the network may have learned from",
}


def model_card(manifest: Manifest, config: ModelConfig, train: TrainConfig, test: Evaluation) -> str:
    """Markdown, made from the manifest, the settings of the run, and the result on the test images."""
    measured, calibration, made = manifest.measured, manifest.calibration, manifest.provenance
    steps = train.steps_in_epoch(made.training_images)
    rise = train.rise(train.epochs * steps)
    risen = min(rise, made.epochs * steps)
    several = test.labels.ndim == 2
    others = [variant.precision for variant in manifest.variants if variant.precision != "fp32"]
    shown = test.labels if several else test.labels[:, None]  # (M, L)
    return TEMPLATE.format(
        name=manifest.name,
        version=manifest.version,
        authors=AUTHORS[manifest.architecture],
        classes=len(manifest.classes),
        width=manifest.image.width,
        height=manifest.image.height,
        colour="grey" if manifest.image.channels == 1 else "RGB",
        polarity=manifest.image.polarity.replace("_", " "),
        dimensions=manifest.capsules.digit_dimensions,
        calibration_source=CALIBRATION_SOURCES[calibration.source],
        figures=_table(
            ("figure", "value"),
            [
                (
                    "test error",
                    f"{measured.test_error:.2f} % ({measured.test_mistakes} of {measured.test_images})",
                ),
                ("largest difference from PyTorch", f"{measured.parity_error:.1e}"),
                ("median reconstruction error, test images", f"{np.median(test.reconstruction_errors):.2f}"),
                (
                    f"bounds within which {calibration.quantile:.0%} of {calibration.images} images lie",
                    f"error up to {calibration.threshold:.2f}, margin from {calibration.margin:.3f}",
                ),
                *(
                    (
                        f"the encoder in {variant.precision}{REMARKS.get(variant.precision, '')}",
                        f"{variant.test_mistakes} mistakes, {variant.agreement:.2f} % classified as by fp32, "
                        f"reconstructions {variant.psnr:.1f} dB from fp32's",
                    )
                    for variant in manifest.variants
                ),
            ],
        ),
        detection=_table(
            ("images", "flagged"),
            [(kind, f"{share:.1f} %") for kind, share in measured.beyond_threshold.items()],
        ),
        classes_table=_table(
            ("class", "test images", "mistakes"),
            [
                (label, int(has.sum()), int((test.wrong & has).sum()))
                for label, has in (
                    (label, (shown == k).any(axis=1)) for k, label in enumerate(manifest.classes)
                )
            ],
        ),
        meaning=meaning(manifest),
        exceptions=_exceptions(manifest, train),
        tested=_tested(manifest, train),
        recipe=_table(
            ("setting", "value"),
            [
                ("dataset", f"{made.dataset}, {made.training_images} training images"),
                ("epochs", f"{made.epochs} of {train.epochs}, in batches of {train.batch_size}"),
                (
                    "first weights",
                    f"those of {made.start.source}, after {made.start.epochs} epochs"
                    if made.start
                    else "random",
                ),
                ("seed", made.seed),
                (
                    "optimizer",
                    f"Adam, {train.learning_rate:g} decaying exponentially to {train.final_learning_rate:g}"
                    if train.schedule == "exponential"
                    else f"Adam, {train.learning_rate:g} decaying as in the authors' code",
                ),
                *(
                    [("warm-up", f"{risen} steps" if risen == rise else f"{risen} of {rise} steps")]
                    if rise
                    else []
                ),
                (
                    "augmentation",
                    f"shifts of up to {train.max_shift} pixels"
                    if train.augmentation == "shift"
                    else "turned, squeezed, shifted, partly erased",
                ),
                ("loss", f"margin loss + {train.reconstruction_weight:g} x summed squared error"),
                ("architecture", config.architecture),
                (
                    "routing iterations",
                    config.routing_iterations if config.architecture == "capsnet" else "none: self-attention",
                ),
                *(
                    (switch.replace("_", " "), "yes, as in the authors' code")
                    for switch in ("capsule_biases", "scaled_votes", "routing_gradients")
                    if getattr(config, switch)
                ),
                (
                    "transformation matrices",
                    "one for each group of primary capsules"
                    if config.shared_weights
                    else "one for each primary capsule",
                ),
                ("parameters", made.parameters),
                ("convolutions trained in", made.precision),
                (
                    "weights stored in",
                    "half precision; computed in single precision"
                    + (f" but for the encoder in {' and in '.join(others)}" if others else ""),
                ),
                ("code", made.code_revision),
            ],
        ),
    )


def meaning(manifest: Manifest) -> str:
    """The section that names each class's dimensions."""
    if not manifest.dimensions:
        return f"{MEANING}\nThat was not measured.\n"
    low, high = manifest.capsules.tweak_range
    words = (
        f"Each was moved from {low:+g} to {high:+g} for up to {IMAGES} training images of the class, and is\n"
        "named after what accounts for the largest share of the change; by more than one thing where others\n"
        "of the class would have the same name. If they still have, those whose first thing becomes less as\n"
        "the dimension rises are “reversed”; some names remain the same. Most change several at once:\n"
        "`manifest.json` has the figures."
    )
    rows = [
        (label, _Markup(", ".join(f"**{d}** {name}" for d, name in enumerate(names))))
        if (names := manifest.dimension_names(label))
        else (label, NOT_MEASURED)
        for label in manifest.classes
    ]
    return f"{MEANING}\n{words}\n\n{_table(('class', 'dimensions'), rows)}\n"


def renew_meaning(card: str, manifest: Manifest) -> str:
    """A card with that section made anew, or put before the one on how the model was made."""
    before, found, rest = card.partition(MEANING)
    if not found:
        before, found, rest = card.partition(RECIPE)
        return f"{before}{meaning(manifest)}\n{found}{rest}"
    return f"{before}{meaning(manifest)}\n{RECIPE}{rest.partition(RECIPE)[2]}"


def _tested(manifest: Manifest, train: TrainConfig) -> str:
    epochs = manifest.provenance.epochs
    if epochs == train.epochs:
        tested = "It was tested after the last epoch."
    else:
        tested = f"The run was not finished: it stands at epoch {epochs} of {train.epochs}."
    if not manifest.variants:
        return tested
    return (
        f"{tested} Which precision a service takes by itself (`CAPSNET_PRECISION=auto`) is chosen by the\n"
        "figures above, which are of the test images."
    )


def _exceptions(manifest: Manifest, train: TrainConfig) -> str:
    lines = []
    if manifest.labels_per_image > 1:
        lines.append(
            f"- Its images show {manifest.labels_per_image} classes each: read as many of the longest"
            " capsules as its prediction. Reconstruction, its error and `in_distribution` are of the longest"
            " alone."
        )
    if train.reconstruction_weight == 0:
        lines.append("- Its decoder was never trained: its reconstructions, and their errors, mean nothing.")
    return "".join(f"{line}\n" for line in lines)


class _Markup(str):
    """A cell that is Markdown already."""


def _table(head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    """A table of plain text, whatever characters it holds, and of `_Markup`."""
    lines = [head, ("---",) * len(head), *(map(_cell, row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(content: object) -> str:
    if isinstance(content, _Markup):
        return content
    return re.sub(r"[\\`*_|<\[&~]", r"\\\g<0>", " ".join(str(content).splitlines()))
