"""A page in a real browser, and all that happened in it."""

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from common.files import ROOT, make_folder

if TYPE_CHECKING:
    from playwright.sync_api import Page

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
PATIENCE = 180_000  # milliseconds; several tests may share a core
KEEP_TOASTS = """
window.toasts = [];
new MutationObserver(changes => {
    for (const change of changes)
        for (const node of change.addedNodes)
            for (const toast of node.querySelectorAll?.("[data-testid='toast-body']") ?? [])
                window.toasts.push(toast.innerText);
}).observe(document, {childList: true, subtree: true});"""
"""JavaScript that keeps gradio's short messages, which vanish after ten seconds."""
DESKTOP, PHONE = (1280, 900), (390, 844)


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
