"""REPORT.md and every table of numbers are what scripts/make_report.py makes of results/*.json."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from common.errors import InputError
from common.files import ROOT


@pytest.fixture(scope="module")
def make_report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_report", ROOT / "scripts" / "make_report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_numbers_are_those_of_the_results(make_report: ModuleType) -> None:
    make_report.main(make_report.Config(check=True))


def test_an_outdated_file_is_named_and_left_alone(
    make_report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = "\n".join(("before", make_report.MARKS[0], "| old |", make_report.MARKS[1], "after", ""))
    for path in ("README.md", "checkpoints/p1_digits/README.md", "checkpoints/p1_grader/README.md"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(marks)
    monkeypatch.setattr(make_report, "ROOT", tmp_path)
    with pytest.raises(InputError, match="out of date"):
        make_report.main(make_report.Config(check=True))
    assert (tmp_path / "README.md").read_text() == marks
    make_report.main(make_report.Config())
    assert "| old |" not in (tmp_path / "README.md").read_text()
    make_report.main(make_report.Config(check=True))


def test_every_picture_and_link_is_there() -> None:
    for page in (ROOT / "README.md", ROOT / "REPORT.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
