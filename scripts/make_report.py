"""Fills the numbers and tables of the Markdown documents, and writes the report as one page.

    python3 -m scripts.make_report
    # and report.pdf, printed by Chromium
    python3 -m scripts.make_report --pdf
    # changes no file and prints what is stale or wrong
    python3 -m scripts.make_report --check

The documents are README.md, REPORT.md, docs/ and the model cards. The syntax of the slots is
documented in common/report.py. docs/report.md becomes report.html, which holds its figures and the
sliders of results/frames/ (scripts/make_frames.py) and requests nothing. A false claim, a missing
result or a broken link is an error with and without --check.
"""

import dataclasses
import sys
from pathlib import Path

import p1_diffusion.study.report
import p2_ddim.study.report
import p3_clip.personalisation.study.report
import p3_clip.study.report
import p3_controlnet.study.report
from common import cli
from common.errors import InputError
from common.files import ROOT, atomic_write, check_files, make_folder
from common.page import write_pdf
from common.report import Results, fill
from common.report_page import report_page

TABLES = {
    **p1_diffusion.study.report.TABLES,
    **p2_ddim.study.report.TABLES,
    **p3_controlnet.study.report.TABLES,
    **p3_clip.study.report.TABLES,
    **p3_clip.personalisation.study.report.TABLES,
}
COMMANDS = {
    "p1_evaluation_2024": "bash scripts/study_p1.sh",
    "p1_evaluation_2025": "bash scripts/study_p1.sh",
    "p2_faces": "bash scripts/study_p2.sh",
    "p2_features": "bash scripts/study_p2.sh",
    "p3_clip_shapes": "bash scripts/study_clip.sh",
    "p3_clip_shapes_evaluation": "bash scripts/study_clip.sh",
    "p3_clip_speed": "bash scripts/study_clip.sh",
    "p3_controlnet_evaluation": "bash scripts/study_controlnet.sh",
    "p3_controlnet_speed": "python3 -m scripts.benchmark_controlnet",
}
"""Commands of the results whose files do not hold their own."""
DOCUMENTS = ("*.md", "docs/**/*.md", "checkpoints/*/README.md")


@dataclasses.dataclass(frozen=True)
class Config:
    """Fills the numbers and tables of the Markdown documents, and writes the report as one page."""

    check: bool = False
    """Change no file; exit with 2 if a number is stale or missing, or a claim is false."""
    html: Path | None = None
    """File of the page. Default: report.html in the project's folder."""
    pdf: bool = False
    """Print the page to a PDF file of the same name, with an installed Chromium or Chrome."""


def main(config: Config) -> None:
    """Fills or checks the documents; if nothing is wrong, writes the page.

    Raises InputError that names the first problem. If there are several, all of them are printed to
    stderr before, one per line.
    """
    page = config.html or ROOT / "report.html"
    if config.check and (config.html or config.pdf):
        raise InputError("--check writes nothing: leave out --html and --pdf")
    check_files(page)
    results = Results(ROOT / "results")
    problems = []
    for path in sorted(path for pattern in DOCUMENTS for path in ROOT.glob(pattern)):
        text, wrong, stale = fill(path, results, TABLES)
        name = path.relative_to(ROOT).as_posix()
        problems += [f"{name}:{problem}" for problem in wrong]
        if config.check:
            problems += [f"{name}:{slot}: run python3 -m scripts.make_report" for slot in stale]
        elif stale:
            atomic_write(path, text.encode())
            print(f"wrote {name}: {len(stale)} slots changed")
    if len(problems) > 1:
        print(*problems, sep="\n", file=sys.stderr)
        raise InputError(f"{len(problems)} slots of the documents are wrong, first {problems[0]}")
    if problems:
        raise InputError(problems[0])
    if not config.check:
        text = report_page(ROOT / "docs" / "report.md", results, TABLES, COMMANDS)
        make_folder(page.parent)
        atomic_write(page, text.encode())
        print(f"wrote {page}")
        if config.pdf:
            write_pdf(page, page.with_suffix(".pdf"))
            print(f"wrote {page.with_suffix('.pdf')}")


if __name__ == "__main__":
    cli.run(main, Config)
