"""Writes REPORT.md and the numbers in README, docs/experiments.md and the model cards from results/*.json: none is typed.

    python3 scripts/make_report.py            (--check only says whether all are up to date)

Each problem's own report.py says what is written of it (see common/report.py); a section is there when its results are.
"""

import dataclasses
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs in a checkout that is not installed

import p1_diffusion.study.report
import p2_ddim.study.report
import p3_clip.personalisation.study.report
import p3_clip.study.report
import p3_controlnet.study.report
from common import cli
from common.errors import InputError
from common.files import ROOT, atomic_write
from common.report import README_HEADER, table

PROBLEMS = (
    p1_diffusion.study.report,
    p2_ddim.study.report,
    p3_controlnet.study.report,
    p3_clip.study.report,
    p3_clip.personalisation.study.report,
)
MARKS = ("<!-- results: written by scripts/make_report.py -->", "<!-- end of results -->")
HEADER = """# Report

Each question of the homework with its figure, the numbers and the command that made them. Written by
`python3 scripts/make_report.py` from `results/`; the sentences that compare are chosen by the numbers."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes REPORT.md and the numbers in the README and the model cards from results/*.json."""

    check: bool = False
    """Change nothing; exit with 2 if a file is out of date."""


def main(config: Config) -> None:
    """Writes or checks the files."""
    results = ROOT / "results"
    paragraphs = [text for problem in PROBLEMS for text in problem.section(results)]
    rows = [row for problem in PROBLEMS for row in problem.readme_rows(results)]
    wanted = {
        ROOT / "REPORT.md": "\n\n".join([HEADER, *paragraphs]) + "\n",
        ROOT / "README.md": fill(ROOT / "README.md", table(README_HEADER, rows)),
    }
    log = ROOT / "docs" / "experiments.md"
    if log.exists():
        wanted[log] = fill(log, p1_diffusion.study.report.recipes(results))
    for problem in PROBLEMS:
        for name, content in problem.cards(results).items():
            card = ROOT / "checkpoints" / name / "README.md"
            wanted[card] = fill(card, "\n\n".join(content))
    for path, text in wanted.items():
        if path.exists() and path.read_text() == text:
            continue
        if config.check:
            raise InputError(f"{path.name} is out of date: run python3 scripts/make_report.py")
        atomic_write(path, text.encode())
        print(f"wrote {path.name}")


def fill(path: Path, content: str) -> str:
    """The file's text with `content` between the marks."""
    text, (start, end) = path.read_text(), MARKS
    if start not in text or end not in text:
        raise InputError(f"{path} lacks the marks between which its numbers belong")
    return re.sub(
        f"{re.escape(start)}.*?{re.escape(end)}", lambda _: f"{start}\n{content}\n{end}", text, flags=re.DOTALL
    )


if __name__ == "__main__":
    cli.run(main, Config)
