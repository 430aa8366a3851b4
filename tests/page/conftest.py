"""A real server and a headless browser: skipped where there is no Playwright, or no Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import cycle_folder, main, start

__all__ = ["cycle_folder", "main", "start"]  # fixtures of theirs that are used here too

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[page]'")

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE_MS = 60_000  # no test depends on speed
HOSTILE = '<img src=x onerror="window.hacked = 1"><script>window.hacked = 2</script>{{7*7}}</textarea><b>bold</b>'


def find_browser(playwright: Any) -> str | None:
    """The browser of the machine, or else the one that Playwright has installed."""
    own = playwright.chromium.executable_path
    return next(filter(None, map(shutil.which, NAMES)), own if Path(own).exists() else None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        path = find_browser(playwright)
        if path is None:
            pytest.skip("there is no Chromium: apt-get install chromium, or playwright install chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def axe() -> str:
    return (Path(__file__).parent / "axe" / "axe.min.js").read_text("utf-8")


def wait_until(page: Any, expression: str) -> Any:
    """The value of an expression in the page, once it is true; its policy forbids the page to evaluate it itself."""
    for _ in range(PATIENCE_MS // 50):
        if value := page.evaluate(expression):
            return value
        page.wait_for_timeout(50)
    raise AssertionError(f"never true: {expression}")


class Window:
    """A window of the browser with the page in it.  What goes wrong in the page fails the test at its end."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.context.set_default_timeout(PATIENCE_MS)
        self.page = self.context.new_page()
        self.faults: list[str] = []
        self.urls: list[str] = []
        self.page.on("pageerror", lambda error: self.faults.append(f"an error: {error}"))
        self.page.on("request", lambda request: self.urls.append(request.url))
        self.page.on("console", self._note)
        self.url = url

    def _note(self, message: Any) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text and "net::ERR" not in message.text:
            self.faults.append(f"the console: {message.text}")

    def open(self, view: str = "playground") -> Any:
        self.page.goto(f"{self.url}/#{view}")
        return self.page


@pytest.fixture
def window(browser: Any) -> Iterator[Any]:
    opened: list[Window] = []

    def open_window(url: str, **options: Any) -> Window:
        opened.append(Window(browser, url, **options))
        return opened[-1]

    yield open_window
    faults = [fault for one in opened for fault in one.faults]
    for one in opened:
        one.context.close()
    assert not faults
