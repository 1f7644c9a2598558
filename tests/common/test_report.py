"""REPORT.md and every table of numbers are what scripts/make_report.py makes of results/*.json."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from common.errors import InputError
from common.files import ROOT, write_json
from p3_clip.personalisation.study import report


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


def test_the_section_on_learned_concepts_says_what_the_numbers_say(tmp_path: Path) -> None:
    """Its sentences are chosen by the numbers; without results there is no section."""
    assert report.section(tmp_path) == [] and report.readme_rows(tmp_path) == [] and report.cards(tmp_path) == {}

    def method(bound: float, error: float) -> dict[str, Any]:
        pair = {"first": 1.0, "second": 1.0, "bound": bound, "swapped": 0.0, "blended": 0.0}
        pair |= {"prompt": "a <wine> circle with <mauve> background", "bound_images": []}
        single = {"presence": 0.9, "colour_error": error, "norm": 1.1}
        return {"singles": {"wine": single, "ring": {"presence": 0.5, "norm": 1.0}}, "pairs": {"place": pair}}

    methods = {
        "untrained placeholder": method(0.0, 40.0),
        "textual inversion": method(0.3, 4.5),
        "Custom Diffusion, joint": method(0.85, 5.0),
    }
    write_json(tmp_path / "p3_personalisation.json", {"images": 100, "clip": None, "methods": methods})
    assert [row[2] for row in report.readme_rows(tmp_path)] == ["4.5", "85%"]
    text = "\n".join(report.section(tmp_path))
    assert "| textual inversion | wine | 90% | 4.5 | - | - | 1.10 |" in text
    assert "| Custom Diffusion, joint | 100% | 100% | 85% | 0% | 0% |" in text
    assert "the largest colour error of a single concept is 4.5 (within the bar of 6)" in text
    assert "in 85% of the pictures (at least 80%), more often than textual inversion with 30%" in text
    assert "it is 0% with untrained placeholder." in text
    methods["Custom Diffusion, joint, cut-mix"] = method(0.9, 5.0)
    write_json(tmp_path / "p3_personalisation.json", {"images": 100, "clip": None, "methods": methods})
    text = "\n".join(report.section(tmp_path))
    assert "For `place` Custom Diffusion, joint, cut-mix puts both concepts into their places in 90%" in text
    assert "it is 0% with untrained placeholder, 85% with Custom Diffusion, joint." in text
    assert [row[2] for row in report.readme_rows(tmp_path)] == ["4.5", "90%"]
    (card,) = report.cards(tmp_path)["concepts_shapes"]
    assert "| `wine` | is there | 90% | 5.0 |" in card and "| each in its place | 90% | - |" in card
    del methods["Custom Diffusion, joint, cut-mix"]
    methods["Custom Diffusion, joint"] = method(0.3, 5.0)
    methods["textual inversion"] = method(0.3, 6.5)
    write_json(tmp_path / "p3_personalisation.json", {"images": 100, "clip": "ViT-B-32.", "methods": methods})
    text = "\n".join(report.section(tmp_path))
    assert "(above the bar of 6)" in text and "(below 80%), not more often than textual inversion" in text
    assert "CLIP (ViT-B-32)" in text and "no independent judgement" not in text
    small = {"images": 100, "clip": "The model in checkpoints/clip_shapes.", "methods": methods}
    write_json(tmp_path / "p3_personalisation.json", small)
    assert "no independent judgement" in "\n".join(report.section(tmp_path))
