"""The tables of zero-shot classification fit what its programs write, here on a tiny model."""

from pathlib import Path

import pytest
from tiny import exit_code

from common.files import read_json, write_json
from common.report import Results
from p3_clip import evaluate, inference
from p3_clip.study import colours, report


@pytest.fixture
def evaluation(clip_world: Path, tmp_path: Path) -> Path:
    """A folder with p3_clip_shapes_evaluation.json, as scripts/study_clip.sh writes it."""
    run, folder = tmp_path / "run", tmp_path / "results"
    paths = ["--images", clip_world / "val", "--labels", clip_world / "id2label.json"]
    flags = [*paths, "--model", clip_world / "model", "--no-use-cache", "--device", "cpu"]
    assert exit_code(inference.main, inference.Config, *flags, "--output-dir", run) == 0
    more = ["--run", run, "--result", folder / "p3_clip_shapes_evaluation.json"]
    assert exit_code(evaluate.main, evaluate.Config, "zero-shot", *more) == 0
    assert exit_code(colours.main, colours.Config, *more, "--cache", tmp_path / "cache") == 0
    return folder


def test_the_tables_have_a_line_for_each_row(evaluation: Path) -> None:
    found = read_json(evaluation / "p3_clip_shapes_evaluation.json")
    rows = {
        "clip_confused": found["confused"],
        "clip_near_classes": found["colours"]["by_distance"],
        "clip_near_colours": found["colours"]["open"]["by_distance"],
    }
    for name, expected in rows.items():
        text = report.TABLES[name](Results(evaluation))
        assert len(text.splitlines()) == 2 + len(expected), name


def test_speed_is_compared_with_the_loop(tmp_path: Path) -> None:
    seconds = {"open_clip loop": 20.0, "this project, second run": 0.5}
    write_json(tmp_path / "p3_clip_speed.json", {"images": 2500, "seconds": seconds})
    lines = report.TABLES["clip_speed"](Results(tmp_path)).splitlines()
    assert lines[2:] == [
        "| open_clip loop | 20.0 | 125 | 1.0 |",
        "| this project, second run | 0.5 | 5,000 | 40.0 |",
    ]
