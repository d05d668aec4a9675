"""The table of settings."""

from pathlib import Path

from service.settings import Settings
from service.settings_table import settings_table

ROOT = Path(__file__).parents[3]


def test_the_committed_table_is_current() -> None:
    """docs/settings.md is what the code says; `python -m service.settings_table` makes it anew."""
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == settings_table()


def test_each_setting_has_one_row() -> None:
    """The table has a row for each field, with its variable, option, default, bounds and meaning."""
    rows = [row for row in settings_table().splitlines() if row.startswith("| `")]
    assert len(rows) == len(Settings.model_fields)
    assert (
        "| `CAPSNET_PORT` | `--port` | `8000` | 0 to 65,535 | Port to listen on; 0 takes any free one. |"
        in rows
    )
    assert any(
        row.startswith("| `CAPSNET_DEVICE` | `--device` | `auto` | `auto`, `cpu`, `cuda` |") for row in rows
    )
    assert any(row.startswith("| `CAPSNET_API_KEYS` | `--api-keys` |  |  |") for row in rows)
    assert all(row.count("|") == 6 for row in rows), "no cell holds a bar of its own"
