"""A picture of a sweep's report.html, as in docs/: scripts/screenshot.py results/<sweep>/report.html docs/report.png"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import typer
from playwright.sync_api import sync_playwright


def main(page: Path, picture: Path, width: int = 1100) -> None:
    """Needs Chromium: make browser."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"] if os.getuid() == 0 else [])
        opened = browser.new_page(viewport={"width": width, "height": 900})
        opened.goto(page.absolute().as_uri())
        opened.wait_for_timeout(500)
        opened.screenshot(path=picture, full_page=True)
        browser.close()


if __name__ == "__main__":
    typer.run(main)
