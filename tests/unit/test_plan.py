"""docs/plan.md names what is there."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
PLAN = (DOCS / "plan.md").read_text(encoding="utf-8")


def test_what_the_plan_points_to_is_there() -> None:
    """Every linked file exists, and every name in the table is defined in the file before it."""
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", PLAN)
    assert links
    assert not [link for link in links if not (DOCS / link).is_file()]
    named = [
        (DOCS / file, name)
        for file, names in re.findall(r"\]\((\.\./training/\w+\.py)\)((?:[^\[|]*`\w+`)+)", PLAN)
        for name in re.findall(r"`(\w+)`", names)
    ]
    assert len(named) > 15
    for file, name in named:
        assert re.search(rf"^ *(def |class )?{name}\b", file.read_text(encoding="utf-8"), re.MULTILINE), name


def test_the_plans_commands_name_rows_that_there_are() -> None:
    """Each `make reproduce-…` of the plan is a row of the experiments."""
    rows = (DOCS.parent / "training" / "experiments.py").read_text(encoding="utf-8")
    for row in re.findall(r"make reproduce-(\S+)", PLAN):
        assert f'"{row}": Row(' in rows
