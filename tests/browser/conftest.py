"""A Chromium or Chrome of this machine, and pages in it that ask nobody but the service."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request

from tests.support.browser import NAMES, installed, launched
from tests.support.process import served

LIMIT = 20_000  # milliseconds, on a machine that has much else to do

Opened = Callable[..., Page]


# No longer than a module: while Playwright runs, no test can run an event loop.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = installed()
    if path is None:
        pytest.skip(f"no browser on PATH: one of {', '.join(NAMES)}")
    with launched(path) as browser:
        yield browser


@pytest.fixture(scope="module")
def service(browser: Browser, tiny_models: Path) -> Iterator[str]:
    """A served process's address; not started where there is no browser."""
    with served(tiny_models) as process:
        yield f"http://127.0.0.1:{process.port}"


@pytest.fixture
def opened(browser: Browser) -> Iterator[Opened]:
    """Opens a page, whose faults fail the test: errors in its scripts, and requests to somebody else."""
    faults: list[str] = []
    contexts = []

    def listen(page: Page, origin: str) -> None:
        def said(message: ConsoleMessage) -> None:
            # The browser itself complains of what it could not load; the page's own words have their tests.
            unloaded = message.text.startswith("Failed to load resource")
            if message.type in ("error", "warning") and not unloaded:
                faults.append(message.text)

        def asked(request: Request) -> None:
            if not request.url.startswith((f"{origin}/", "data:", "blob:")):
                faults.append(request.url)

        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", said)
        page.on("request", asked)

    def open_page(address: str, **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(LIMIT)
        url = urlsplit(address)
        listen(page, f"{url.scheme}://{url.netloc}")
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


@pytest.fixture
def page(opened: Opened, service: str) -> Page:
    return opened(service)
