"""`python -m service.settings_table`: every setting as one Markdown table, which is `docs/settings.md`."""

import sys
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from service.settings import Settings

_HEAD = """# Settings

Each is an environment variable, or the option of `capsnet-serve` in its place, which wins. Several values \
are separated by commas. In Kubernetes, a Service named `capsnet` sets `CAPSNET_PORT` to its address in \
every pod beside it: set the port yourself, or `enableServiceLinks: false`. This page is made by \
`python -m service.settings_table > docs/settings.md`.

| variable | option | default | values | meaning |
|---|---|---|---|---|
"""


def settings_table() -> str:
    """The page, as `docs/settings.md` holds it."""
    return _HEAD + "".join(_row(name, field) for name, field in Settings.model_fields.items())


def _row(name: str, field: FieldInfo) -> str:
    option = name.replace("_", "-")
    options = f"`--{option}`, `--no-{option}`" if field.annotation is bool else f"`--{option}`"
    meaning = str(field.description).replace("<", "&lt;")  # Markdown takes it for HTML
    cells = (f"`CAPSNET_{name.upper()}`", options, _default(field.default), _values(field), meaning)
    return f"| {' | '.join(cells)} |\n"


def _default(value: object) -> str:
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value.as_posix() if isinstance(value, Path) else value}`"


def _values(field: FieldInfo) -> str:
    """The bounds of a number, the choices of a text; empty where any value does."""
    bounds: dict[str, Any] = {}
    for constraint in field.metadata:
        for bound in ("ge", "gt", "le"):
            if hasattr(constraint, bound):
                bounds[bound] = getattr(constraint, bound)
    if "gt" in bounds:
        return f"more than {bounds['gt']:,}, at most {bounds['le']:,}"
    if "ge" in bounds:
        return f"{bounds['ge']:,} to {bounds['le']:,}"
    if field.annotation is bool:
        return "`true`, `false`"
    return ", ".join(f"`{choice}`" for choice in get_args(field.annotation) if isinstance(choice, str))


if __name__ == "__main__":
    sys.stdout.write(settings_table())
