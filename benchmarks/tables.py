"""Tables in Markdown."""

from typing import Any


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A line for the head, one of dashes, and one for each row."""
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *rows])
