"""Fills the numbers and tables of the Markdown documents from results/*.json.

    python3 -m scripts.make_report
    # changes no file and prints what is stale or wrong
    python3 -m scripts.make_report --check

The documents are README.md, REPORT.md, docs/ and the model cards. The syntax of the slots is
documented in common/report.py. A false claim, a missing result or a broken link is an error with
and without --check.
"""

import dataclasses
import sys

import p1_diffusion.study.report
import p2_ddim.study.report
import p3_clip.personalisation.study.report
import p3_clip.study.report
import p3_controlnet.study.report
from common import cli
from common.errors import InputError
from common.files import ROOT, atomic_write
from common.report import Results, fill

TABLES = {
    **p1_diffusion.study.report.TABLES,
    **p2_ddim.study.report.TABLES,
    **p3_controlnet.study.report.TABLES,
    **p3_clip.study.report.TABLES,
    **p3_clip.personalisation.study.report.TABLES,
}
DOCUMENTS = ("*.md", "docs/**/*.md", "checkpoints/*/README.md")


@dataclasses.dataclass(frozen=True)
class Config:
    """Fills the numbers and tables of the Markdown documents from results/*.json."""

    check: bool = False
    """Change no file; exit with 2 if a number is stale or missing, or a claim is false."""


def main(config: Config) -> None:
    """Fills or checks the documents.

    Raises InputError that names the first problem. If there are several, all of them are printed to
    stderr before, one per line.
    """
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


if __name__ == "__main__":
    cli.run(main, Config)
