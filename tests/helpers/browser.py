"""Open HTML files in headless Chromium, without a network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def chromium_path() -> str | None:
    """Return the path of Chromium: $CHROME, else one on the PATH; None: there is none."""
    candidates = (os.environ.get("CHROME") or "", *PROGRAMS)
    found = (shutil.which(name) for name in candidates if name)
    return next((path for path in found if path), None)


@contextmanager
def open_page(path: Path, width: int = 1280, dark: bool = False) -> Iterator[tuple[Any, list]]:
    """Open an HTML file; skips the test where there is no Chromium or no playwright.

    Every request other than for the file itself is refused, and fails the test when the page is
    closed.

    Args:
        width: width of the window in pixels; below 600 it is a phone with a touch screen.
        dark: the system's colour scheme.

    Yields:
        (playwright's page, list of errors on the console, which grows).
    """
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = chromium_path()
    if program is None:
        pytest.skip("there is no Chromium; install it, or set CHROME to its path")
    errors: list[str] = []
    requests: list[str] = []
    address = Path(path).resolve().as_uri()

    def answer(route: Any) -> None:
        if route.request.url.partition("#")[0] == address:
            route.continue_()
        else:
            requests.append(route.request.url)
            route.abort()

    with _browser(sync_api, program) as browser:
        context = browser.new_context(
            viewport={"width": width, "height": 844 if width < 600 else 900},
            color_scheme="dark" if dark else "light",
            has_touch=width < 600,
            device_scale_factor=2 if width < 600 else 1,
        )
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        context.route("**/*", answer)
        page = context.new_page()
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        yield page, errors
        context.close()
    assert not requests, f"the page asked for {requests}"


@contextmanager
def _browser(sync_api: Any, program: str) -> Iterator[Any]:
    """Start Chromium, or take the one of a page that is open: playwright starts only one."""
    if _running:
        yield _running[0]
        return
    # Chromium's sandbox refuses to run as root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        _running.append(browser)
        try:
            yield browser
        finally:
            _running.clear()
            browser.close()


_running: list[Any] = []
"""the browser, while a page is open"""
