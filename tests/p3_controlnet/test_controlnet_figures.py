"""The figures of Problem 3, 2025: each shows what it says, on a tiny model, from a folder or
drawn."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import contents, exit_code, refused
from tiny_base import save_small_models
from tiny_pairs import write_pairs

from common.grid import GAP, MARGIN
from common.images import read_rgb
from p3_controlnet.study import figures
from p3_controlnet.study.figures import FIGURES, badness, main, small, verdict
from p3_controlnet.study.tasks import real_tasks


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, control/ and data/testing with three pairs."""
    root = save_small_models(tmp_path_factory.mktemp("world"))
    write_pairs(root / "data" / "testing", 3)
    return root


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and small pictures."""
    layouts = figures.layout_tasks
    monkeypatch.setattr(figures, "layout_tasks", lambda kind, **_: layouts(kind, count=1))
    for name, value in {"WORST": 1, "BASE_ROWS": 2, "BASE_COLUMNS": 2, "SCALE_ROWS": 1}.items():
        monkeypatch.setattr(figures, name, value)
    monkeypatch.setattr(figures, "SCALES", (0.0, 1.0))


def arguments(world: Path, out: Path, *flags: Any) -> tuple[Any, ...]:
    model = ("--checkpoint", world / "base", "--control", world / "control", "--device", "cpu")
    return ("--output-dir", out, *model, "--steps", 1, "--chunk-size", 2, "--rows", 2, *flags)


def test_every_figure_is_drawn(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        exit_code(main, figures.Config, *arguments(world, tmp_path, "--fill50k", world / "data"))
        == 0
    )
    assert sorted(contents(tmp_path)) == sorted(f"{name}.png" for name in FIGURES)
    assert capsys.readouterr().out.splitlines() == [
        str(tmp_path / f"{name}.png") for name in FIGURES
    ]
    height = {
        name: read_rgb(tmp_path / f"{name}.png").shape[1] // figures.SHOWN for name in FIGURES
    }
    rows = {
        "circles": 2,
        "failures": 2,
        "two_circles": 1,
        "more_circles": 3,
        "base": 2,
        "control_scale": 1,
        "canvas": 4,
    }
    assert height == rows


def test_pictures_of_a_folder_are_shown_as_they_are(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No model is read for them."""
    monkeypatch.setattr(figures, "load_model", None)
    data = world / "data" / "testing"
    flags = ("--data", data, "--images", data / "target", "--only", "circles", "failures")
    assert exit_code(main, figures.Config, *arguments(world, tmp_path, *flags)) == 0
    figure = read_rgb(tmp_path / "circles.png")
    target = small(read_rgb(data / "target" / "0.png")[None])[0]
    top, right = 24, figure.shape[2] - MARGIN  # below the margin and the line of labels
    for end in (right, right - figures.SHOWN - GAP):  # the result and the target beside it
        assert torch.equal(figure[:, top : top + figures.SHOWN, end - figures.SHOWN : end], target)
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "0.png").write_bytes((data / "target" / "0.png").read_bytes())
    flags = ("--data", data, "--images", tmp_path / "some", "--only", "circles")
    assert exit_code(main, figures.Config, *arguments(world, tmp_path / "none", *flags)) == 2


def test_failures_are_the_worst(world: Path) -> None:
    """A wrong colour is worse than none, a picture without an object the worst."""
    good = {"iou": 0.99, "circle_error": 1.0, "background_error": 1.0}
    assert (
        badness(good)
        < badness(good | {"circle_error": 20.0})
        < badness(good | {"iou": 0.0, "circle_error": 50.0})
    )
    task = real_tasks(world / "data")[0]
    line = figures.measure_tasks([task], task.target[None], 64)[0]
    assert verdict(line) == f"IoU {line['iou']:.2f}, colours 0 and 0"
    flat = task.target[:, :1, :1].expand(3, 512, 512)[None]
    assert (
        verdict(figures.measure_tasks([task], flat, 64)[0])
        == "IoU 0.00, colours 50 and 50 (no circle)"
    )


def test_choices_that_make_no_sense(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags in (("--fill50k", world, "--data", world), ("--images", world)):
        assert "--fill50k and --data exclude each other" in refused(
            capsys, main, figures.Config, *arguments(world, tmp_path, *flags)
        )
    sentence = refused(
        capsys,
        main,
        figures.Config,
        *arguments(world, tmp_path, "--only", "circles", "--fill50k", tmp_path),
    )
    assert "the pairs of fill50k are not there" in sentence
