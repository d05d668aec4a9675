"""A Chromium or Chrome that this machine has."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def installed() -> str | None:
    """Its path, or None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def launched(path: str) -> Iterator[Browser]:
    """The browser at `path`, without a window and without errands of its own."""
    options = [
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-gpu",  # or it imitates one, at a cost beyond the pages' own
        "--disable-sync",
    ]
    if os.geteuid() == 0:
        options.append("--no-sandbox")  # Chromium refuses root otherwise
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=options)
        try:
            yield browser
        finally:
            browser.close()
