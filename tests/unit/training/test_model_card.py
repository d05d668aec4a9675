"""What a card says of classes, whatever they are called."""

from pathlib import Path

from service.manifest import Dimension, Manifest, read_manifest
from training.model_card import meaning

SHIPPED = Path(__file__).parents[3] / "models" / "mnist" / "3"


def named(*classes: str, measured: int) -> Manifest:
    """A manifest of these classes, of which the first `measured` have one dimension, called slant."""
    slant = Dimension(name="slant", moved=1, effects={}, shares={})
    return read_manifest(SHIPPED).model_copy(
        update={"classes": classes, "dimensions": dict.fromkeys(classes[:measured], (slant,))}
    )


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
