"""The 2025 grader's replica as a program: what it counts, names and refuses, and how it answers."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pages import outline
from PIL import Image
from tiny import exit_code, refused, run_process
from torch import Tensor

from common.clip import loading
from common.colour import CSS_COLOURS
from common.data.layouts import make_layouts, write_layouts
from common.data.shapes import Scene, Shape
from common.errors import InputError
from common.files import ROOT
from common.images import read_rgb, write_png
from common.metrics.circles import Circle
from p3_controlnet.evaluate import Config, assign_colours, cells, grade, main

SCENES = (
    Scene("teal", (Shape("circle", "peru", 0.5, 0.5, 0.25),)),
    Scene("old lace", (Shape("circle", "navy", 0.25, 0.3, 0.2),)),
    Scene("gold", (Shape("circle", "indigo", 0.9, 0.6, 0.3),)),
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """`prompt.json`, source/, target/ of three circles."""
    write_layouts(tmp_path / "data", SCENES)
    return tmp_path / "data"


@pytest.fixture
def out(data: Path, tmp_path: Path) -> Path:
    """A perfect output folder."""
    return Path(shutil.copytree(data / "target", tmp_path / "out"))


def arguments(out: Path, data: Path, *more: object) -> list[object]:
    flags = [
        "--prompts",
        data / "prompt.json",
        "--sources",
        data / "source",
        "--targets",
        data / "target",
    ]
    return [
        "--images",
        out,
        *flags,
        "--clip",
        "none",
        "--result",
        data.parent / "result.json",
        *more,
    ]


def result_of(out: Path, data: Path, code: int, *more: object) -> dict:
    assert exit_code(main, Config, *arguments(out, data, *more)) == code
    return json.loads((data.parent / "result.json").read_text())


def colour(name: str) -> Tensor:
    return torch.tensor(CSS_COLOURS[name], dtype=torch.uint8)[:, None, None]


# ----------------------------------------------------------------------------
# The verdict.


def test_the_targets_themselves_pass(
    out: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = result_of(out, data, 0)
    assert (
        result["iou"] > 0.995
        and result["iou_target"] == 1.0
        and result["images"] == 3
        and result["passes"]
    )
    assert result["circle_error"] == result["background_error"] == 0.0
    assert result["circle_right"] == result["background_right"] == 1.0
    assert (
        result["grader"]["score"] == 1.0
        and result["grader"]["lines"] == 3
        and not result["grader"]["with_clip"]
    )
    assert [line["circle_nearest"] for line in result["lines"]] == [["peru"], ["navy"], ["indigo"]]
    printed = capsys.readouterr().out
    assert "PASS: 3 images" in printed and "the CLIP factor is left out" in printed


def test_wrong_colours_fail_though_the_grader_likes_them(
    out: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The seeds' own failure: the right shape in dark grey on teal."""
    for path in out.iterdir():
        image = read_rgb(path)
        image[:, (image == image[:, 1, 1][:, None, None]).all(0)] = colour("dark slate gray")[:, 0]
        write_png(path, image)
    result = result_of(out, data, 1)
    assert (
        result["iou"] > 0.995 and result["grader"]["score"] == 1.0 and result["circle_error"] == 0.0
    )
    assert result["background_error"] > 15.0 and result["background_right"] == 0.0
    assert "FAIL" in capsys.readouterr().out
    assert exit_code(main, Config, *arguments(out, data, "--colour-bar", 100)) == 0


def test_a_flat_picture_counts_as_error_50(out: Path, data: Path) -> None:
    """Also for the background, whose colour is right."""
    write_png(out / "0.png", colour("teal").expand(3, 512, 512).contiguous())
    result = result_of(out, data, 1)
    line = result["lines"][0]
    assert line["iou"] == line["iou_target"] == 0.0 and line["circle_nearest"] == [None]
    assert line["circle_error"] == line["background_error"] == 50.0
    assert result["circle_error"] == pytest.approx(50.0 / 3) and result["iou"] == pytest.approx(
        2 / 3, abs=0.005
    )


def test_a_disc_in_the_wrong_place(out: Path, data: Path) -> None:
    """The grader's mask of line 1 is the background in both, so it scores well; the true circle's
    IoU does not."""
    image = colour("old lace").expand(3, 512, 512).clone()
    image[:, 400:480, 400:480] = colour("navy")
    write_png(out / "1.png", image)
    line = result_of(out, data, 1)["lines"][1]
    assert line["iou"] == 0.0 and line["circle_error"] > 50.0 and line["background_error"] == 0.0
    assert line["iou_centre"] > 0.8


def test_images_below_target_are_found(out: Path, data: Path) -> None:
    (out.parent / "nested").mkdir()
    out.rename(out.parent / "nested" / "target")
    assert result_of(out.parent / "nested", data, 0)["dropped"] == {}


# ----------------------------------------------------------------------------
# What the grader drops, and what cannot be graded.


def small(path: Path) -> str:
    Image.open(path).resize((256, 512)).save(path)
    return "has 256x512 pixels, but 512x512 are expected"


def missing(path: Path) -> str:
    path.unlink()
    return "does not exist"


def broken(path: Path) -> str:
    path.write_bytes(b"no image")
    return "is not a readable image"


@pytest.mark.parametrize("spoil", [small, missing, broken])
def test_what_the_grader_drops_is_named_and_fails(
    spoil: Callable[[Path], str], out: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = spoil(out / "1.png")
    bars = ("--iou-bar", 0.5, "--colour-bar", 50)
    result = result_of(out, data, 1, *bars, "--html", data.parent / "page.html")
    assert list(result["dropped"]) == ["1.png"] and reason in result["dropped"]["1.png"]
    assert result["images"] == 2 == result["grader"]["lines"] and result["grader"]["score"] == 1.0
    assert result["lines"][1]["iou"] == 0.0 and result["lines"][1]["circle_error"] == 50.0
    printed = capsys.readouterr().out
    page = (data.parent / "page.html").read_text()
    found = outline(page)
    assert [image["alt"].split(":")[0] for image in found.all("img")][:2] == ["1.png", "1.png"]
    assert len(found.all("article", "failed")) == 1 and "no readable image" in page
    assert len(found.all("img")) == 8  # the missing image has a control image and a target only
    assert re.search(f"^dropped 1.png: .*{reason}", printed, re.M) and "1 lines dropped" in printed


def test_what_cannot_be_graded_is_one_sentence(
    out: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = (capsys, main, Config)
    assert "none does not exist" in refused(*program, *arguments(out.parent / "none", data))
    assert "none of the 3 images can be read" in refused(*program, *arguments(ROOT, data))
    assert "--resolution must be between" in refused(
        *program, *arguments(out, data, "--resolution", 0)
    )
    assert "does not hold SAM2" in refused(*program, *arguments(out, data, "--sam2", data))
    assert not (data.parent / "result.json").exists()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "prompt.json, line 2 is not valid JSON"),
        ('{"source": "9.png", "target": "1.png", "prompt": "x"}', "line 2: .*9.png does not exist"),
    ],
)
def test_a_bad_line_is_refused(
    line: str, sentence: str, out: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (data / "prompt.json").read_text().splitlines()
    (data / "prompt.json").write_text("\n".join([lines[0], line]))
    said = refused(capsys, main, Config, *arguments(out, data))
    assert re.search(sentence, said), said


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("a cat", "'a cat' is not of the form COLOUR circle"),
        (
            "red circle next to lime circle with teal background",
            "its prompt names 2 circle colours",
        ),
        ("two red circles with teal background", "its prompt asks for 2"),
        (
            "dark olive green circle with dark olive green background",
            "a circle in the background's colour cannot be seen",
        ),
        ("cyan circle with Aqua background", "a circle in the background's colour"),
    ],
)
def test_a_line_that_cannot_be_graded_is_left_out_and_listed(
    prompt: str, reason: str, out: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = result_of(out, data, 0)
    lines = (data / "prompt.json").read_text().splitlines()
    changed = json.loads(lines[1]) | {"prompt": prompt}
    (data / "prompt.json").write_text("\n".join([lines[0], json.dumps(changed), lines[2]]))
    capsys.readouterr()
    result = result_of(out, data, 0)
    assert list(result["ungraded"]) == ["1.png"] and reason in result["ungraded"]["1.png"]
    graded = [before["lines"][i] for i in (0, 2)]
    for name in ("iou", "circle_error", "background_error"):
        assert result[name] == sum(line[name] for line in graded) / 2
    assert result["grader"]["lines"] == 3  # the course's grader does not read colours
    printed = capsys.readouterr().out
    assert re.search("^left out of the means 1.png: ", printed, re.M) and "1 lines left" in printed


def test_a_blank_control_picture_is_left_out_and_none_is_refused(
    out: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blank = torch.zeros(3, 512, 512, dtype=torch.uint8)
    write_png(data / "source" / "1.png", blank)
    assert "1.png shows no circle" in result_of(out, data, 0)["ungraded"]["1.png"]
    for name in ("0.png", "2.png"):
        write_png(data / "source" / name, blank)
    capsys.readouterr()
    said = refused(capsys, main, Config, *arguments(out, data))
    assert "none of the 3 lines" in said and "0.png shows no circle" in said


def test_grade_sh_knows_the_problem_by_its_prompts(out: Path, data: Path) -> None:
    script, folders = ROOT / "scripts" / "grade.sh", (data / "source", data / "target")
    done = run_process(["bash", script, out, data / "prompt.json", *folders, "--clip", "none"])
    assert done.returncode == 0 and "PASS: 3 images" in done.stdout, done.stderr
    assert run_process(["bash", script, out, data / "prompt.json", data / "source"]).returncode == 2
    done = run_process(["bash", script, out, data / "prompt.json", data / "none", data / "target"])
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: ")
        and len(done.stderr.splitlines()) == 1
    )


# ----------------------------------------------------------------------------
# Several circles.


@pytest.mark.parametrize("kind", ["two", "two_shared", "three", "touching", "cut"])
def test_several_circles_are_measured_one_by_one(kind: str, tmp_path: Path) -> None:
    scenes = make_layouts(kind, count=2)
    write_layouts(tmp_path / "data", scenes, "count" if kind == "two_shared" else "each")
    out = Path(shutil.copytree(tmp_path / "data" / "target", tmp_path / "out"))
    result = result_of(out, tmp_path / "data", 0)
    assert result["circle_error"] == 0.0 and result["circle_right"] == 1.0
    for line, scene in zip(result["lines"], scenes, strict=True):
        assert len(line["iou_circles"]) == len(scene.shapes) and min(line["iou_circles"]) > 0.98
        assert (
            line["circle_nearest"]
            == line["circle_asked"]
            == [shape.colour for shape in scene.shapes]
        )
        assert line["circle_errors"] == line["own_errors"] == [0.0] * len(scene.shapes)


def test_exchanged_colours_show_in_the_errors_from_left_to_right(tmp_path: Path) -> None:
    scene = make_layouts("two", count=1)[0]
    first, second = scene.shapes
    exchanged = dataclasses.replace(
        scene,
        shapes=(
            dataclasses.replace(first, colour=second.colour),
            dataclasses.replace(second, colour=first.colour),
        ),
    )
    write_layouts(tmp_path / "data", [scene])
    write_layouts(tmp_path / "out", [exchanged])
    (line,) = result_of(tmp_path / "out" / "target", tmp_path / "data", 0)["lines"]
    assert line["circle_errors"] == [0.0, 0.0]
    assert min(line["own_errors"]) > 9.0


def test_a_circle_left_out_shows_in_its_own_number(tmp_path: Path) -> None:
    scene = make_layouts("two", count=1)[0]
    write_layouts(tmp_path / "data", [scene])
    lone = Scene(scene.background, scene.shapes[:1])
    write_layouts(tmp_path / "lone", [lone])
    out = Path(shutil.copytree(tmp_path / "lone" / "target", tmp_path / "out"))
    line = result_of(out, tmp_path / "data", 1)["lines"][0]
    assert line["iou_circles"][0] > 0.98 and line["iou_circles"][1] == 0.0
    assert line["circle_right"] == 0.5 and line["background_error"] == 0.0


def test_colours_may_be_swapped() -> None:
    """The prompt does not say which circle is which; one name stands for all circles."""
    red, lime = (255.0, 0.0, 0.0), (0.0, 255.0, 0.0)

    def scores(measured: list, names: list[str]) -> list[tuple[str, float, bool]]:
        return [(name, score.error, score.right) for name, score in assign_colours(measured, names)]

    assert scores([red, lime], ["lime", "red"]) == [("red", 0.0, True), ("lime", 0.0, True)]
    assert [(name, right) for name, _, right in scores([red, lime], ["red"])] == [
        ("red", True),
        ("red", False),
    ]
    assert scores([None, lime], ["lime", "red"]) == [("red", 50.0, False), ("lime", 0.0, True)]


def test_every_pixel_belongs_to_one_circle() -> None:
    parts = cells([Circle(100.0, 256.0, 80.0), Circle(400.0, 256.0, 40.0)])
    assert parts.shape == (2, 512, 512) and bool((parts.sum(0) == 1).all())
    # On the line between them the border lies midway between the edges, at (180 + 360) / 2.
    assert parts[0, 256, 269] and not parts[0, 256, 271]


# ----------------------------------------------------------------------------
# The grader's score.


def test_the_score_is_the_mean_of_the_ten_best() -> None:
    lines = [{"iou_centre": i / 20, "cosine": 0.5} for i in range(20)] + [{"target": "dropped"}]
    result = grade(lines)
    assert (
        result["score"] == pytest.approx(0.75 * sum(range(10, 20)) / 200) and result["lines"] == 20
    )
    without = grade([{"iou_centre": 0.5, "cosine": None}])
    assert without == {"score": 0.5, "with_clip": False, "lines": 1}


class OneAxis:
    """A CLIP for which every picture and text is the same, or opposite."""

    def __init__(self, sign: float) -> None:
        self.sign = sign

    def preprocess(self, image: Image.Image) -> Tensor:
        assert image.size == (512, 512) and image.mode == "RGB"
        return torch.zeros(3, 8, 8)

    def encode_images(self, pixels: Tensor) -> Tensor:
        return torch.ones(len(pixels), 1)

    def encode_texts(self, texts: list[str]) -> Tensor:
        return torch.full((len(texts), 1), self.sign)


@pytest.mark.parametrize(("sign", "score"), [(1.0, 1.0), (-1.0, 0.0)])
def test_clip_is_the_second_factor(
    sign: float, score: float, out: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_clip", lambda *_: (OneAxis(sign), "a fake."))
    result = result_of(out, data, 0, "--clip", "auto")
    assert result["grader"] == {
        "score": score,
        "with_clip": True,
        "lines": 3,
        "mask": "two colours",
        "clip": "a fake.",
    }


def test_the_small_clip_is_never_the_judge(
    out: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only OpenAI's weights are asked for; without them there is no judge, and weights asked for by
    name must be there."""
    asked = []

    def load(*names: str | None) -> None:
        asked.append(names)
        raise InputError("the weights are not there: see --pretrained")

    monkeypatch.setattr(loading, "load_clip", load)
    note = result_of(out, data, 0, "--clip", "auto")["grader"]["clip"]
    assert note == "left out, since the weights are not there: see --clip"
    assert "not there" in refused(capsys, main, Config, *arguments(out, data, "--clip", "some.pt"))
    name = "ViT-B-32-quickgelu"
    assert asked == [(name, None, "auto"), (name, "some.pt", "auto")]
    assert result_of(out, data, 0, "--clip", "none")["grader"]["clip"] == "left out as asked for"
