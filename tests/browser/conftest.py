"""A real browser for the tests of pages: Debian's Chromium, driven headless by playwright."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from web_page import CHROMIUM, DESKTOP, FLAGS, KEEP_TOASTS, PATIENCE, Visit

if TYPE_CHECKING:
    from playwright.sync_api import Browser


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


@pytest.fixture
def visit(browser: "Browser") -> Iterator[Callable[..., Visit]]:
    """`visit(url, size, **context_options)` opens a page of its own in a window of `size`."""
    contexts = []

    def opened(url: str, size: tuple[int, int] = DESKTOP, **options: Any) -> Visit:
        width, height = size
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.add_init_script(KEEP_TOASTS)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
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
