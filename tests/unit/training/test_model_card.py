"""What a card says of a model's figures, and of classes, whatever they are called."""

from pathlib import Path

import numpy as np
import pytest

from service.manifest import Dimension, Manifest, read_manifest
from training.config import ModelConfig, TrainConfig
from training.evaluate import Evaluation
from training.model_card import meaning, model_card

SHIPPED = Path(__file__).parents[3] / "models" / "mnist" / "3"


def named(*classes: str, measured: int) -> Manifest:
    """A manifest of these classes, of which the first `measured` have one dimension, called slant."""
    slant = Dimension(name="slant", moved=1, effects={}, shares={})
    return read_manifest(SHIPPED).model_copy(
        update={"classes": classes, "dimensions": dict.fromkeys(classes[:measured], (slant,))}
    )


@pytest.mark.parametrize(
    ("channels", "colour", "source", "words"),
    [
        (1, "grey", "held-out", "training images that were held out"),
        (3, "RGB", "training", "training images that the network may have learned from"),
    ],
)
def test_figures(channels: int, colour: str, source: str, words: str) -> None:
    """A card has each class's own mistakes, the middle one of the errors, and where its bounds come from."""
    classes = ("bar", "pole", "dot")
    manifest = named(*classes, measured=3)
    manifest = manifest.model_copy(
        update={
            "image": manifest.image.model_copy(update={"channels": channels}),
            "calibration": manifest.calibration.model_copy(update={"source": source}),
        }
    )
    result = Evaluation(
        labels=np.array([0, 0, 0, 1, 1]),
        predictions=np.array([0, 1, 2, 1, 0]),
        reconstruction_errors=np.array([1, 2, 3, 4, 90], np.float32),
        lengths=np.zeros((5, 3), np.float32),
    )
    card = model_card(manifest, ModelConfig(classes), TrainConfig(), result)
    assert f"in a 28x28 {colour} image (light on dark)" in card
    assert f"The bounds come from {words}.\n" in card
    assert "| median reconstruction error, test images | 3.00 |\n" in card
    assert "| bar | 3 | 2 |\n| pole | 2 | 1 |\n| dot | 0 | 0 |\n" in card


def test_a_class_that_was_not_measured_has_a_row() -> None:
    """Each class stands in the table of dimensions; of one that was never recognised it says so."""
    text = meaning(named("bar", "pole", measured=1))
    assert "| bar | **0** slant |\n" in text
    assert "| pole | not measured: none of the training images tried was recognised |\n" in text


def test_a_class_is_no_markup() -> None:
    """Whatever a class is called is text in one cell of a table; the dimensions' numbers stay bold."""
    odd = ("line|<b>x", r"a\b*c*_d_`e`", "two\r\nlines", "&lt; [x](y) ~~z~~", "T-shirt/top 1")
    text = meaning(named(*odd, measured=5))
    assert [row for row in text.splitlines() if row.startswith("|")][2:] == [
        r"| line\|\<b>x | **0** slant |",
        r"| a\\b\*c\*\_d\_\`e\` | **0** slant |",
        "| two lines | **0** slant |",
        r"| \&lt; \[x](y) \~\~z\~\~ | **0** slant |",
        "| T-shirt/top 1 | **0** slant |",
    ]
