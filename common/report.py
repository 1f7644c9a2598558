"""Parts of REPORT.md, the README and the model cards: Markdown tables of what results/*.json hold.

Each problem's own report.py has what it says there:

- `section(results)`: its part of REPORT.md, paragraphs; empty while nothing is measured.
- `readme_rows(results)`: its rows of the README's table, `README_HEADER`.
- `cards(results)`: what its model cards say between their marks, by the model's folder in checkpoints/.
"""

from pathlib import Path
from typing import Any

from common.files import read_json

README_HEADER = ["task", "metric", "ours", "target", "command"]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def load(results: Path, name: str) -> Any:
    """The content of results/NAME.json, or None if it was not made yet."""
    path = results / f"{name}.json"
    return read_json(path) if path.exists() else None


def figure(results: Path, folder: str, name: str) -> str:
    """The link to results/figures/FOLDER/NAME.png, or nothing where that was not made yet."""
    there = (results / "figures" / folder / f"{name}.png").is_file()
    return f"![](results/figures/{folder}/{name}.png)" if there else ""


def joined(*parts: str) -> str:
    """The parts that are not empty, each a paragraph."""
    return "\n\n".join(part for part in parts if part)
