"""The report's section on zero-shot classification, from results of the real programs on a tiny model."""

import shutil
from pathlib import Path

import pytest
from tiny import exit_code

from common.files import read_json, write_json
from p3_clip import evaluate, inference
from p3_clip.study import colours, report


@pytest.fixture
def results(clip_world: Path, tmp_path: Path) -> Path:
    """p3_clip_shapes.json and p3_clip_shapes_evaluation.json, as scripts/study_clip.sh writes them."""
    run, folder = tmp_path / "run", tmp_path / "results"
    folder.mkdir()
    paths = ["--images", clip_world / "val", "--labels", clip_world / "id2label.json", "--model", clip_world / "model"]
    arguments = [*paths, "--output-dir", run, "--no-use-cache", "--device", "cpu"]
    assert exit_code(inference.main, inference.Config, *arguments) == 0
    more = ["--run", run, "--result", folder / "p3_clip_shapes_evaluation.json"]
    assert exit_code(evaluate.main, evaluate.Config, "zero-shot", *more) == 0
    assert exit_code(colours.main, colours.Config, *more, "--cache", tmp_path / "cache") == 0
    shutil.copy(run / "results.json", folder / "p3_clip_shapes.json")
    return folder


def test_without_results_nothing_is_said(tmp_path: Path) -> None:
    assert report.section(tmp_path) == [] and report.readme_rows(tmp_path) == [] and report.cards(tmp_path) == {}


def test_the_section_says_what_the_numbers_say(results: Path) -> None:
    found = read_json(results / "p3_clip_shapes.json")
    for part, value in ((found, 0.5), (found["ensemble"], 11 / 12)):
        part["metrics"] |= {"acc1": value, "acc5": 1.0}
    write_json(results / "p3_clip_shapes.json", found)
    text = "\n".join(report.section(results))
    assert "12 pictures of 3 classes, chance is 33%" in text
    assert "| single | 50.0% (25.4% to 74.6%) | 100.0% (75.8% to 100.0%) |" in text  # Wilson's interval of 6 in 12
    assert "| ensemble | 91.7% (64.6% to 98.5%) |" in text
    assert "changes top-1 by +41.7 points, beyond the single template's interval" in text
    assert "All 3 classes" in text and "Calibration" in text and "How near may colours be?" in text
    assert "Speed" not in text
    assert [row[2] for row in report.readme_rows(results)] == ["50.0%", "91.7%"]
    card = report.cards(results)["clip_shapes"]
    assert "| single | 50.0%" in card[0] and "How near may colours be?" in card[1]


def test_the_speed_joins_when_it_was_measured(results: Path) -> None:
    seconds = {"open_clip loop": 20.0, "this project, first run": 10.0, "this project, second run": 0.5}
    seconds |= {"imports alone": 5.0, "program, first run": 18.0, "program, second run": 8.0}
    write_json(
        results / "p3_clip_speed.json",
        {"model": "M", "images": 2500, "threads": 2, "repeats": 3, "device": "cpu", "seconds": seconds},
    )
    text = report.section(results)[-1]
    assert "| this project, second run | 0.5 | 5,000 | 40.0 |" in text
    assert "Reading ahead pays here: a first run has 2.00 times the loop's speed." in text
    assert report.readme_rows(results)[-1][1:4] == [
        "whole program, second run with another template on 2,500 images",
        "8.0 s, 5.0 s of it imports",
        "under 10 s",
    ]


CALIBRATION = {"bins": 15, "ece": 0.1, "scale": 50.0, "fitted_scale": 60.0, "ece_unfitted": 0.1, "ece_fitted": 0.05}


@pytest.mark.parametrize(
    ("changed", "sentences"),
    [
        ({}, ["the model is not sure enough of itself", "goes down from 0.100 to 0.050"]),
        ({"fitted_scale": 40.0}, ["the model is too sure of itself"]),
        ({"fitted_scale": 50.04}, ["the model is about as sure of itself as it should be"]),
        ({"ece_fitted": 0.2}, ["goes up from 0.100 to 0.200"]),
        ({"ece_fitted": 0.1002}, ["stays at 0.100"]),
        ({"fitted_scale": 9999.0}, ["it has no finite optimum"]),
        ({"fitted_scale": 0.1}, ["it has no finite optimum"]),
    ],
)
def test_calibration_is_said_in_both_directions(changed: dict[str, float], sentences: list[str]) -> None:
    text = report._calibration(CALIBRATION | changed)
    assert all(sentence in text for sentence in sentences)


@pytest.mark.parametrize(
    ("recalls", "sentence"),
    [
        ([1.0, 1.0], "No picture is confused."),
        ([1.0, 0.9], "The one class with mistakes is b (90%)."),
        ([0.8, 0.9], "The weakest classes are a (80%), b (90%)."),
    ],
)
def test_only_classes_with_mistakes_are_weak(recalls: list[float], sentence: str) -> None:
    pairs = [{"truth": "b", "prediction": "a", "count": 1}] if min(recalls) < 1.0 else []
    rows = [{"name": name, "recall": recall} for name, recall in zip("ab", recalls, strict=True)]
    assert report._mistakes({"per_class": rows, "confused": pairs}).startswith(sentence)


@pytest.mark.parametrize(("right", "shown"), [(10, "5 of 10 successes and 2 of 2 failures"), (12, "0 of 0 failures")])
def test_examples_are_as_many_as_there_are(right: int, shown: str) -> None:
    assert shown in report._examples({"images": 12, "metrics": {"acc1": right / 12}})
