"""The document and the service agree on whatever schemathesis makes up."""

from pathlib import Path

from tests.fuzz.run import fuzz
from tests.support.tiny_model import write_tiny_model


def test_every_check_of_schemathesis_holds(tmp_path: Path) -> None:
    """What the document allows is answered as it says, and what it does not is refused as it says."""
    write_tiny_model(tmp_path)
    assert fuzz(tmp_path, examples=20, seed=1) == 0
