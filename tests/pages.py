"""What every page of the project must be: valid HTML that needs nothing but itself."""

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "input", "br", "hr"}


class Outline(HTMLParser):
    """The tags of a page. Asserts that they are closed in order, and that ids occur once."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(ids) == len(set(ids))
        here = {attributes["href"] for tag, attributes in self.tags if tag == "a"}
        assert all(link[1:] in ids for link in here if link.startswith("#"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), attrs
        if tag in ("p", "h1", "h2", "h3", "table", "figure", "pre", "ol"):
            assert "p" not in self._open, f"<{tag}> inside a paragraph"
        if tag not in VOID:
            self._open.append(tag)
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag, f"</{tag}> closes nothing"

    def all(self, tag: str, kind: str = "") -> list[dict[str, str]]:
        """The attributes of all such tags, of the class `kind` if it is given."""
        return [
            attributes
            for name, attributes in self.tags
            if name == tag and (not kind or kind in attributes.get("class", "").split())
        ]


def outline(page: str) -> Outline:
    """The tags of a page, after asserting that it is valid and refers to no other file."""
    assert page.startswith("<!DOCTYPE html>") and "<title>" in page
    found = Outline(page)
    for tag, attributes in found.tags:
        for name in ("src", "srcset", "poster", "data", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
        assert tag == "a" or attributes.get("href", "data:").startswith("data:"), tag
        assert tag not in ("iframe", "object", "embed", "base", "form")
        if tag == "img":
            assert attributes["alt"]
    assert all(url.startswith("data:") for url in re.findall(r"url\((.{5})", page))
    assert "@import" not in page and "fetch(" not in page and "http-equiv" in page
    return found
