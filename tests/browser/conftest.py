"""A headless Chromium for pages that must work in a browser without a network: `make browser-test`.

The executable is $CHROMIUM, or `chromium`, `chromium-browser` or `google-chrome` on PATH; without one the tests skip.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 900}


@dataclass
class Opened:
    """A page in the browser; what it complained of and what it asked a network for."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def overflow(self) -> int:
        """Pixels by which the document is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chromium; skips where there is none."""
    given = os.environ.get("CHROMIUM")
    found = shutil.which(given) if given else next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        where = f"CHROMIUM={given} is not there" if given else f"none of {', '.join(NAMES)} is on PATH"
        pytest.skip(f"no Chromium: {where}; install one or set CHROMIUM to its path")
    return found


@pytest.fixture(scope="session")
def browser(chromium) -> Iterator[Any]:
    """One headless browser for all tests."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make browser-test does so")
    with api.sync_playwright() as playwright:
        # as root, as in containers, Chromium runs without its sandbox only
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        instance = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield instance
        instance.close()


@pytest.fixture
def open_page(browser) -> Iterator[Callable[..., Opened]]:
    """``open_page(path, viewport=…, color_scheme=…, javascript=…)`` opens a local file in a fresh, offline context."""
    contexts = []

    def start(
        path: Path, viewport: dict = DESKTOP, color_scheme: str = "light", javascript: bool = True, **options: Any
    ) -> Opened:
        context = browser.new_context(
            viewport=viewport, color_scheme=color_scheme, java_script_enabled=javascript, offline=True, **options
        )
        contexts.append(context)
        context.set_default_timeout(120_000)  # a busy machine is no failure
        page = context.new_page()
        opened = Opened(page)
        page.on("console", lambda message: opened.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: opened.errors.append(str(error)))
        page.on(
            "request",
            lambda request: (
                opened.requests.append(request.url) if not request.url.startswith(("file:", "data:", "blob:")) else None
            ),
        )
        page.goto(Path(path).resolve().as_uri(), wait_until="load")
        return opened

    yield start
    for context in contexts:
        context.close()
