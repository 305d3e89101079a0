"""A headless Chromium for tests of pages; what a page asks for and complains of is recorded."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import ConsoleMessage, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class Visit:
    """A page, the addresses that it asked for, and its errors and warnings."""

    page: "Page"
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@contextmanager
def open_browser(width: int = 1440, height: int = 900) -> Iterator[Visit]:
    """An empty page in a new browser; skips the test where there is no browser."""
    api = pytest.importorskip("playwright.sync_api", reason="no playwright (requirements.txt)")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed; .ci/browser installs one")
    with api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu"]  # tests may run as root
        browser = playwright.chromium.launch(executable_path=path, args=options)
        page = browser.new_context(viewport={"width": width, "height": height}).new_page()
        page.set_default_timeout(20_000)
        visit = Visit(page)
        page.on("request", lambda request: visit.requests.append(request.url))
        page.on("pageerror", lambda error: visit.complaints.append(str(error)))

        def keep(message: "ConsoleMessage") -> None:
            if message.type in ("error", "warning"):
                visit.complaints.append(message.text)

        page.on("console", keep)
        try:
            yield visit
        finally:
            browser.close()
