"""A real browser for the tests of pages: Debian's Chromium, driven headless by playwright."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from common.files import ROOT, make_folder

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SCREENSHOTS = ROOT / "outputs" / "browser"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
DESKTOP, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """Chromium with a new profile; tests are skipped where it or playwright is missing."""
    api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is missing: pip install -e '.[browser]'"
    )
    if not CHROMIUM.is_file():
        pytest.skip(f"{CHROMIUM} is missing: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=list(FLAGS))
        yield browser
        browser.close()


@dataclasses.dataclass(frozen=True)
class Visit:
    """A page and all that happened in it."""

    page: "Page"
    errors: list[str]
    """Errors in the console and exceptions of scripts."""
    requests: list[str]
    """Addresses of all requests, web sockets included."""

    def left_the_loopback(self) -> list[str]:
        """The requests to other computers."""
        inside = ("data", "blob", "file", "about")
        return [
            url
            for url in self.requests
            if (parts := urlsplit(url)).scheme not in inside and parts.hostname not in LOOPBACK
        ]

    def screenshot(self, name: str) -> Path:
        """Writes the whole page to outputs/browser/NAME.png."""
        path = make_folder(SCREENSHOTS) / f"{re.sub(r'[^a-z0-9_]+', '_', name.lower())}.png"
        self.page.screenshot(path=path, full_page=True)
        return path


@pytest.fixture
def visit(browser: "Browser") -> Iterator[Callable[..., Visit]]:
    """`visit(url, size, **context_options)` opens a page of its own in a window of `size`."""
    contexts = []

    def opened(url: str, size: tuple[int, int] = DESKTOP, **options: Any) -> Visit:
        width, height = size
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        seen = Visit(page, [], [])
        page.on(
            "console",
            lambda message: seen.errors.append(message.text) if message.type == "error" else None,
        )
        page.on("pageerror", lambda error: seen.errors.append(str(error)))
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("websocket", lambda socket: seen.requests.append(socket.url))
        page.goto(url)
        return seen

    yield opened
    for context in contexts:
        context.close()
