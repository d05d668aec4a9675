"""The model card: what a person should know before using an exported network."""

from collections.abc import Sequence

import numpy as np

from service.manifest import Manifest
from training.config import ModelConfig, TrainConfig
from training.evaluate import Evaluation


def model_card(manifest: Manifest, config: ModelConfig, train: TrainConfig, test: Evaluation) -> str:
    """Markdown, made from the manifest, the settings of the run, and the result on the test images."""
    made, image, measured = manifest.provenance, manifest.image, manifest.measured
    calibration = manifest.calibration
    flagged = 100 * float((test.reconstruction_errors > calibration.threshold).mean())
    held = (
        "held-out training images"
        if calibration.source == "held-out"
        else "training images (the network was trained on all of them, so none was left to hold out)"
    )
    colour = "grey" if image.channels == 1 else "RGB"
    return "\n".join(
        [
            f"# {manifest.name}, version {manifest.version}",
            "",
            "A capsule network after Sabour, Frosst and Hinton, *Dynamic Routing Between Capsules* (NIPS 2017).",
            f"It finds one of {len(manifest.classes)} classes in a {image.width}x{image.height} {colour} picture "
            f"({image.polarity.replace('_', ' ')}), describes it by a {manifest.capsules.digit_dimensions}-dimensional "
            "capsule, and draws the picture again from that capsule.",
            "",
            "## Figures",
            "Of the exported graphs, run by ONNX Runtime:",
            "",
            *_table(
                ["", ""],
                [
                    [
                        "test error",
                        f"{measured.test_error:.2f} % ({measured.test_mistakes} of {measured.test_images:,})",
                    ],
                    ["largest difference from PyTorch", f"{measured.parity_error:.1e}"],
                    ["median reconstruction error, test images", f"{np.median(test.reconstruction_errors):.2f}"],
                    [
                        f"in-distribution threshold ({calibration.quantile:.0%} of {calibration.images:,} {held})",
                        f"{calibration.threshold:.2f}",
                    ],
                    ["test images beyond the threshold", f"{flagged:.2f} %"],
                ],
            ),
            "",
            "Reconstruction error is the summed squared error over the picture, both sides in [0, 1].",
            "",
            "Mistakes for each class:",
            "",
            *_table(
                ["class", "images", "mistakes"],
                [
                    [
                        label,
                        str(int((test.labels == k).sum())),
                        str(int(((test.labels == k) & (test.predictions != k)).sum())),
                    ]
                    for k, label in enumerate(manifest.classes)
                ],
            ),
            "",
            "## How it was made",
            "",
            *_table(
                ["", ""],
                [
                    ["dataset", f"{made.dataset}, {made.training_images:,} training images"],
                    ["epochs", f"{made.epochs} of {train.epochs}, batches of {train.batch_size}, seed {made.seed}"],
                    [
                        "learning rate",
                        f"Adam, {train.learning_rate:g} decaying exponentially to {train.final_learning_rate:g}",
                    ],
                    ["augmentation", f"shifts of up to {train.max_shift} pixels"],
                    ["loss", f"margin loss + {train.reconstruction_weight:g} x summed squared error"],
                    ["routing", f"{config.routing_iterations} iterations"],
                    [
                        "transformation matrices",
                        "one for each group" if config.shared_weights else "one for each primary capsule",
                    ],
                    ["parameters", f"{made.parameters:,}"],
                    ["convolutions trained in", made.precision],
                    ["weights stored in", "half precision, computed with in single precision"],
                    ["code", made.code_revision],
                ],
            ),
            "",
            "The test images were looked at once, after the last epoch of a schedule fixed beforehand.",
            "",
            "## Limits",
            "- It sees one object on a plain background. A picture with none, or with two, still gets a class; "
            "`in_distribution` is the only hint that something is wrong, and an imperfect one.",
            "- A capsule's length says how present a class is. It is not a probability, and the lengths do not sum to one.",
            "- What a dimension stands for was found by the network and differs from class to class and from "
            "one training run to the next.",
        ]
    ) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
