"""Take the README's picture of the playground: python -m tests.browser.picture docs/playground.png"""

import argparse
from pathlib import Path

from playwright.sync_api import expect

from tests.support.browser import NAMES, installed, launched
from tests.support.process import served

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    path = installed()
    if path is None:
        raise SystemExit(f"no browser on PATH: expected one of {', '.join(NAMES)}")
    with served(ROOT / "models", default_model="mnist") as process, launched(path) as browser:
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        page.goto(f"http://127.0.0.1:{process.port}")
        expect(page.locator(".strip img")).to_have_count(16 * 11)
        page.locator("#dimension-3").fill("0.15")
        expect(page.locator("#tweaked-caption")).to_contain_text("bent: read again")
        page.screenshot(path=output)


if __name__ == "__main__":
    main()
