"""The studies of the small model: what they measure on pictures whose content is known, and that
they run and go on."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import environment, exit_code, refused, run_process
from tiny_base import tiny_base, tiny_control
from tiny_pairs import write_pairs
from torch import Tensor

from common.colour import CSS_COLOURS, NAMES, colour_difference
from common.data.shapes import Scene, Shape, render
from common.files import ROOT, read_json
from common.images import read_rgb, resize
from common.latent.generate import ControlledGenerationConfig
from common.latent.small import DEFAULT_CONTROLLED_GUIDANCE, DEFAULT_GUIDANCE, save_model
from p3_controlnet import inference
from p3_controlnet.loading import ModelConfig, load_model
from p3_controlnet.study import canvas, prompts
from p3_controlnet.study import sweeps as study
from p3_controlnet.study.failures import failures
from p3_controlnet.study.prompts import measure_scene, prompt_scenes
from p3_controlnet.study.report import binding
from p3_controlnet.study.sweeps import main
from p3_controlnet.study.tasks import draw_tasks, layout_tasks, measure_tasks, real_tasks

PAIR = Scene(
    "teal", (Shape("circle", "peru", 0.3, 0.3, 0.2), Shape("star", "old lace", 0.7, 0.7, 0.24))
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, control/ and fill50k/testing with two pairs."""
    root = tmp_path_factory.mktemp("world")
    base = tiny_base()
    save_model(root / "base", base, zero_terminal=True)
    tiny_control(base).save(root / "control")
    write_pairs(root / "fill50k" / "testing", 2, ("{}.png", "{}.png"))
    return root


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """One change to the default in each sweep."""
    for name in ("BASE_SWEEP", "CIRCLES_SWEEP"):
        monkeypatch.setattr(study, name, ({}, {"guidance_scale": 4.0}))
    monkeypatch.setattr(study, "SETS", study.SETS[:2])
    monkeypatch.setattr(study, "SEEDS", (0,))
    monkeypatch.setattr(study, "STRIDES", (1.0, None))
    for name, value in {"CANVAS_PARTS": 2, "CANVAS_CIRCLES": 3}.items():
        monkeypatch.setattr(canvas, name, value)


def run(world: Path, results: Path, name: str, *flags: Any) -> list[dict]:
    model = (
        "--checkpoint",
        world / "base",
        "--control",
        world / "control",
        "--device",
        "cpu",
        "--steps",
        1,
    )
    assert (
        exit_code(main, study.Config, name, *model, "--results", results, "--count", 1, *flags) == 0
    )
    result = read_json(results / f"p3_controlnet_{name}.json")
    return result.get("rows", [result])


# ----------------------------------------------------------------------------
# Without control.


def test_the_prompts_name_every_colour_and_one_or_two_shapes() -> None:
    scenes = prompt_scenes()
    assert len(scenes) == 200 == len({scene.caption for scene in scenes}) and scenes[
        :5
    ] == prompt_scenes(5)
    assert {scene.shapes[0].colour for scene in scenes} == set(NAMES)
    assert {len(scene.shapes) for scene in scenes[::2]} == {1} and {
        len(scene.shapes) for scene in scenes[1::2]
    } == {2}
    for scene in scenes:
        colours = [
            CSS_COLOURS[name]
            for name in (scene.background, *(shape.colour for shape in scene.shapes))
        ]
        assert all(
            colour_difference(a, b) >= 10.0 for i, a in enumerate(colours) for b in colours[:i]
        )


def shown(scene: Scene) -> Tensor:
    """A picture of the small model's size, enlarged as its own are."""
    return resize(render(scene, 64), 512)


@pytest.mark.parametrize(
    "scene", [PAIR, Scene("gold", (Shape("triangle", "navy", 0.5, 0.4, 0.3),)), *prompt_scenes(3)]
)
def test_the_right_picture_has_the_right_colours(scene: Scene) -> None:
    line = measure_scene(shown(scene), scene, 64)
    regions = line["objects"] + line["background"]
    assert {region["asked"] for region in line["objects"]} == {
        shape.colour for shape in scene.shapes
    }
    assert all(region["nearest"] == region["asked"] for region in regions)
    assert all(region["error"] < 0.5 and region["right"] for region in regions)
    assert all(each["shape_right"] for each in line["objects"]) and not line["extra"]


def test_wrong_colours_and_missing_objects_show() -> None:
    flat = measure_scene(shown(Scene("teal", ())), PAIR, 64)
    assert [region["error"] for region in flat["objects"] + flat["background"]] == [50.0] * 3
    lone = measure_scene(shown(Scene("teal", PAIR.shapes[1:])), PAIR, 64)
    assert {region["asked"]: region["error"] == 50.0 for region in lone["objects"]} == {
        "peru": True,
        "old lace": False,
    }
    assert (
        sum(region["right"] for region in lone["objects"]) == 1 and lone["background"][0]["right"]
    )
    other = measure_scene(shown(Scene("navy", PAIR.shapes)), PAIR, 64)
    assert other["background"][0]["nearest"] == "navy" and other["background"][0]["error"] > 20.0
    assert all(region["right"] for region in other["objects"])


def test_the_base_study_goes_on_where_it_stopped(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = run(world, tmp_path, "base")
    assert [row["sampling"]["guidance_scale"] for row in rows] == [DEFAULT_GUIDANCE.scale, 4.0]
    assert rows[0]["regions"] == 2 and 0.0 <= rows[0]["right"] <= 1.0 and rows[0]["error"] > 0.0
    assert rows[0]["renderings"]["right"] == rows[0]["renderings"]["shape_right"] == 1.0
    assert "renderings" not in rows[1]
    (alone,) = run(world, tmp_path / "other", "base", "--default-only")
    assert alone["sampling"] == rows[0]["sampling"] and alone["error"] == rows[0]["error"]
    monkeypatch.setattr(study, "measure_base", lambda *_: pytest.fail("it is measured again"))
    assert run(world, tmp_path, "base") == rows


def test_a_picture_without_an_object_counts_fully(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = [PAIR, Scene("gold", (Shape("triangle", "navy", 0.5, 0.4, 0.3),))]
    pictures = torch.stack([shown(PAIR), shown(Scene("gold", ()))])
    monkeypatch.setattr(prompts, "draw_prompts", lambda *_: pictures)
    row = prompts.measure_base(tiny_base(), scenes, ControlledGenerationConfig())
    assert row["regions"] == 5 and row["without_object"] == row["missing_objects"] == 1
    assert row["error"] == pytest.approx(2 * 50.0 / 5, abs=0.3) and row["right"] == pytest.approx(
        3 / 5
    )
    assert row["worst"][0]["prompt"] == scenes[1].caption


def test_a_picture_with_one_more_object_is_not_right() -> None:
    lone = Scene("gold", (Shape("circle", "navy", 0.3, 0.3, 0.2),))
    twice = Scene("gold", (*lone.shapes, Shape("circle", "navy", 0.75, 0.75, 0.1)))
    pictures = torch.stack([shown(lone), shown(twice)])
    row = prompts.measure_pictures(pictures, [lone, lone], 64)
    assert row["shape_right"] == 0.5 and row["right"] == 1.0


def test_shapes_are_counted_by_kind() -> None:
    square = Scene("gold", (Shape("square", "navy", 0.5, 0.5, 0.2),))
    circle = Scene("gold", (Shape("circle", "navy", 0.5, 0.5, 0.2),))
    pictures = torch.stack([shown(square), shown(circle), shown(circle)])
    row = prompts.measure_pictures(pictures, [square, square, circle], 64)
    assert row["by_kind"] == {"circle": 1.0, "square": 0.5, "triangle": None, "star": None}


# ----------------------------------------------------------------------------
# With control.


def test_the_circles_are_those_of_the_graders_command(world: Path, tmp_path: Path) -> None:
    """The same pictures, to the byte."""
    data = world / "fill50k" / "testing"
    files = (
        "--prompts",
        data / "prompt.json",
        "--sources",
        data / "source",
        "--output-dir",
        tmp_path / "out",
    )
    model = (
        "--checkpoint",
        world / "control",
        "--base",
        world / "base",
        "--device",
        "cpu",
        "--steps",
        2,
    )
    assert exit_code(inference.main, inference.Config, *files, *model) == 0
    tasks = real_tasks(world / "fill50k")
    loaded = load_model(ModelConfig(world / "base", control=world / "control"))
    pictures = draw_tasks(loaded, tasks, ControlledGenerationConfig(steps=2), show_progress=False)
    for task, picture in zip(tasks, pictures, strict=True):
        assert torch.equal(read_rgb(tmp_path / "out" / task.name), picture)


def test_the_circles_study_measures_each_setting(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = run(world, tmp_path, "circles", "--fill50k", world / "fill50k")
    assert [row["sampling"]["guidance_scale"] for row in rows] == [
        DEFAULT_CONTROLLED_GUIDANCE.scale,
        4.0,
    ]
    assert len(rows[0]["lines"]) == 1 == rows[0]["pairs"] and "lines" not in rows[1]
    assert rows[0]["evaluations"] == 1 and 0.0 <= rows[0]["iou"] <= 1.0
    result = run(world, tmp_path, "autoencoder", "--fill50k", world / "fill50k")[0]
    assert result["resized"]["iou"] > 0.97 and result["resized"]["circle_error"] < 0.5
    assert 0.0 < result["psnr_worst"] <= result["psnr"] < 40.0  # an untrained autoencoder
    assert "with --fill50k" in refused(
        capsys, main, study.Config, "circles", "--checkpoint", world / "base"
    )
    assert "--count must be at least 1" in refused(capsys, main, study.Config, "base", "--count", 0)


def test_the_defaults_evaluate_25_times_at_most() -> None:
    """Read again, since the sweeps are shortened here."""
    source = Path(study.__file__).read_text()
    assert (
        '{"steps": 25}' in source
        and ControlledGenerationConfig().steps <= 25
        and ControlledGenerationConfig().sampler != "heun"
    )


def test_several_circles_and_canvases_are_measured(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    rows = run(world, tmp_path, "two_circles")
    assert binding(rows) in capsys.readouterr().out
    assert [(row["kind"], row["wording"]) for row in rows] == [
        ("two", "each"),
        ("two_shared", "each"),
    ]
    assert all(
        len(row["lines"][0]["iou_circles"]) == 2 and "failures" in row["lines"][0] for row in rows
    )
    rows = run(world, tmp_path, "canvas")
    assert [row["stride"] for row in rows] == [16, None] and all(
        0.0 <= row["iou"] <= 1.0 for row in rows
    )


def test_size_and_time_are_measured(world: Path, tmp_path: Path) -> None:
    row = run(world, tmp_path, "size", "--count", 1)[0]
    model = load_model(ModelConfig(world / "base", control=world / "control"))
    numbers = sum(param.numel() for param in model.parameters())
    assert row["megabytes"] == pytest.approx(2 * numbers / 10**6)
    assert row["seconds_per_picture"] > 0.0


def test_a_right_canvas_would_be_measured_as_right(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_base()
    task, hint = canvas.canvas_task(model, 0)
    assert hint.shape == (3, 128, 128) and task.source.shape == task.target.shape == (3, 512, 512)
    monkeypatch.setattr(canvas, "draw_canvas", lambda model, task, *_: task.target)
    row = canvas.measure_canvas(model, None, 1, ControlledGenerationConfig())
    assert (
        row["iou"] > 0.97
        and row["iou_each"] > 0.97
        and row["circle_error"] == row["background_error"] == 0.0
    )


def paint(pictures: Tensor, masks: Sequence[Tensor], colour: str) -> Tensor:
    for mask in masks:
        pictures[0][:, mask] = torch.tensor(CSS_COLOURS[colour], dtype=torch.uint8)[:, None]
    return pictures


def test_failures_are_named() -> None:
    task = layout_tasks("two", count=1)[0]
    at = torch.arange(512.0) + 0.5
    discs = [torch.hypot(at - c.x, at[:, None] - c.y) < c.radius for c in task.circles]
    line = measure_tasks([task], task.target[None], 64)[0]
    (left, right), ground = line["circle_asked"], line["background_nearest"]
    assert failures(line) == []

    def said(masks: Sequence[Tensor], colour: str) -> list[str]:
        return failures(
            measure_tasks([task], paint(task.target[None].clone(), masks, colour), 64)[0]
        )

    assert said([discs[1]], ground) == ["circle 2 is missing"]
    assert said(discs, ground) == ["no circle"]
    assert said([discs[1]], left) in (
        [f"circle 2 is {left}, not {right}"],
        [f"circle 1 is {left}, not {right}"],
    )
    other = next(
        name
        for name in NAMES
        if min(
            float(colour_difference(CSS_COLOURS[name], CSS_COLOURS[n]))
            for n in (left, right, ground)
        )
        > 25
    )
    assert said([~(discs[0] | discs[1])], other) == [f"the background is {other}, not {ground}"]
    upper = discs[0] & (at[:, None] < task.circles[0].y)
    assert said([upper], ground)[0].startswith(
        "circle 1 is m"
    )  # missing a half: misshapen or missing


def programs_of(script: str, tmp_path: Path) -> tuple[list[str], list[str]]:
    """The script's trainings and measurements, in turns, told by a stand-in for Python."""
    echo = tmp_path / "python"
    echo.write_text('#!/bin/sh\necho "$@"\n')
    echo.chmod(0o755)
    command = ["bash", ROOT / "scripts" / script, "--seed", "3"]
    result = run_process(command, env=environment(PYTHON=str(echo), RUNS_DIR="RUNS"))
    assert result.returncode == 0, result.stderr
    *lines, last = result.stdout.splitlines()
    assert "scripts.make_report" in last
    return lines[::2], lines[1::2]


def test_each_text_is_trained_with_one_and_with_several_circles(tmp_path: Path) -> None:
    trained, measured = programs_of("study_control_text.sh", tmp_path)
    choices = set()
    for training, measuring in zip(trained, measured, strict=True):
        assert "p3_controlnet.train" in training and training.endswith("--seed 3")
        words = training.split()
        following = dict(itertools.pairwise(words))
        choices.add((following["--control-text"], following["--several-fraction"]))
        assert f"two_circles --checkpoint {following['--base']}" in measuring
        assert measuring.endswith(f"--control {following['--run-dir']}/last")
    assert choices == set(itertools.product(("full", "empty"), ("0", "0.4")))


def test_the_script_trains_one_choice_at_a_time(tmp_path: Path) -> None:
    trained, measured = programs_of("study_ldm.sh", tmp_path)
    assert all("base.train_unet" in line and line.endswith("--seed 3") for line in trained)
    choices = [
        line.partition("--warmup 100 ")[2].removesuffix("--seed 3").split() for line in trained
    ]
    assert choices[0] == [] and all(choices[1:]) and len(choices) == len(measured) == 4
    for line, study_line in zip(trained, measured, strict=True):
        run_dir = line.split("--run-dir ")[1].split()[0]
        assert f"--checkpoint {run_dir}/last --default-only" in study_line
