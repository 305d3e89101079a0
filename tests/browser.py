"""A headless Chromium for tests of pages; what a page asks for and complains of is recorded."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@dataclass
class Visit:
    """A page, the addresses that it asked for, and its errors and warnings."""

    page: "Page"
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@contextmanager
def open_browser(width: int = 1440, height: int = 900) -> Iterator[Visit]:
    """An empty page in a browser with a new profile; skips the test where there is no browser."""
    api = pytest.importorskip("playwright.sync_api", reason="no playwright (requirements.txt)")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed; .ci/browser installs one")
    with tempfile.TemporaryDirectory() as profile, api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=path,
            headless=True,
            args=list(OPTIONS),
            viewport={"width": width, "height": height},
        )
        page = context.new_page()
        page.set_default_timeout(20_000)
        visit = Visit(page)
        page.on("request", lambda request: visit.requests.append(request.url))
        page.on("pageerror", lambda error: visit.complaints.append(str(error)))
        page.on(
            "console",
            lambda message: (
                message.type in ("error", "warning") and visit.complaints.append(message.text)
            ),
        )
        try:
            yield visit
        finally:
            context.close()
