"""The study of learned concepts: what is measured on pictures whose content is known, and the
programs end to end."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from tiny import contents, exit_code, refused
from tiny_concepts import make_world
from torch import Tensor

from common.colour import CSS_COLOURS
from common.data.concepts import DRAWN, GOLD, HOLE, MAUVE, SLATE, WINE, draw_photo
from common.data.shapes import Shape, render_mask
from common.files import ROOT
from common.latent.load import load_base
from p3_clip.personalisation.concepts import Concept
from p3_clip.personalisation.custom_diffusion import CustomDiffusionResult, projections
from p3_clip.personalisation.model import save_learned
from p3_clip.personalisation.study import figures, measure
from p3_clip.personalisation.study import sweeps as study
from p3_clip.personalisation.study.measure import (
    PAIRS,
    Judgement,
    colour_error,
    is_present,
    judge_beside,
    judge_place,
    judge_place_ring,
    look,
    rates,
)

RED, WHITE = CSS_COLOURS["red"], CSS_COLOURS["white"]
MIXED, BETWEEN, GILDED = (
    tuple(round((a + b) / 2) for a, b in zip(*colours, strict=True))
    for colours in ((WINE, MAUVE), (WINE, SLATE), (GOLD, MAUVE))
)
SIDE = 64


def scene(background: tuple[int, ...], *objects: tuple[str, tuple[int, ...], float]) -> Tensor:
    """uint8 [3, 64, 64] with (kind, colour, x) objects; a ring is a kind too."""
    picture = (
        torch.tensor(background, dtype=torch.uint8).view(3, 1, 1).expand(3, SIDE, SIDE).clone()
    )
    for kind, colour, x in objects:
        shape = Shape("circle" if kind == "ring" else kind, "", x, 0.5, 0.2)
        mask = render_mask(shape, SIDE)
        if kind == "ring":
            mask &= ~render_mask(Shape("circle", "", x, 0.5, HOLE * 0.2), SIDE)
        picture[:, mask] = torch.tensor(colour, dtype=torch.uint8).view(3, 1)
    return picture


@pytest.mark.parametrize("name", DRAWN)
def test_every_photo_of_a_concept_shows_it_and_no_other(name: str) -> None:
    for index in range(5):
        seen = look(draw_photo(name, index, side=SIDE), 1)
        assert [other for other in DRAWN if is_present(other, seen)] == [name]
        if DRAWN[name].colour:
            assert colour_error(name, seen) < 1.0


def test_an_empty_picture_shows_nothing() -> None:
    seen = look(scene(MAUVE), 1)
    assert not any(is_present(name, seen) for name in DRAWN)
    assert colour_error("mauve", seen) == colour_error("wine", seen) == 50.0
    assert not any(any(judge(seen)) for judge in (judge_place, judge_beside, judge_place_ring))


@pytest.mark.parametrize(
    ("background", "colour", "expected"),
    [
        (MAUVE, WINE, Judgement(True, True, bound=True, swapped=False, blended=False)),
        (WINE, MAUVE, Judgement(True, True, bound=False, swapped=True, blended=False)),
        (WHITE, WINE, Judgement(True, False, bound=False, swapped=False, blended=False)),
        (MAUVE, RED, Judgement(False, True, bound=False, swapped=False, blended=False)),
        (WHITE, MIXED, Judgement(False, False, bound=False, swapped=False, blended=True)),
    ],
)
def test_two_colours_in_one_picture(background: Any, colour: Any, expected: Judgement) -> None:
    assert judge_place(look(scene(background, ("circle", colour, 0.5)), 1)) == expected


@pytest.mark.parametrize(
    ("background", "kind", "colour", "expected"),
    [
        (MAUVE, "ring", GOLD, Judgement(True, True, bound=True, swapped=False, blended=False)),
        (MAUVE, "ring", RED, Judgement(True, True, bound=True, swapped=False, blended=False)),
        (MAUVE, "circle", GOLD, Judgement(False, True, bound=False, swapped=False, blended=False)),
        (WHITE, "ring", GOLD, Judgement(True, False, bound=False, swapped=False, blended=False)),
        (WHITE, "ring", MAUVE, Judgement(True, True, bound=False, swapped=True, blended=False)),
        (WHITE, "ring", GILDED, Judgement(True, False, bound=False, swapped=False, blended=True)),
    ],
)
def test_a_ring_on_a_colour(background: Any, kind: str, colour: Any, expected: Judgement) -> None:
    assert judge_place_ring(look(scene(background, (kind, colour, 0.5)), 1)) == expected


@pytest.mark.parametrize(
    ("objects", "expected"),
    [
        (
            [("triangle", SLATE, 0.25), ("circle", WINE, 0.75)],
            Judgement(True, True, True, swapped=False, blended=False),
        ),
        (
            [("triangle", WINE, 0.25), ("circle", SLATE, 0.75)],
            Judgement(False, False, False, swapped=True, blended=True),
        ),
        (
            [("triangle", SLATE, 0.25), ("circle", RED, 0.75)],
            Judgement(True, False, False, swapped=False, blended=False),
        ),
        (
            [("circle", SLATE, 0.25), ("circle", WINE, 0.75)],
            Judgement(False, True, False, swapped=False, blended=False),
        ),
        ([("triangle", BETWEEN, 0.5)], Judgement(False, False, False, swapped=False, blended=True)),
    ],
)
def test_a_shape_and_a_colour_beside_each_other(objects: Any, expected: Judgement) -> None:
    assert judge_beside(look(scene(WHITE, *objects), 2)) == expected


@pytest.mark.parametrize("inner", ["triangle", "circle"])
def test_a_disc_with_another_object_on_it_is_no_ring(inner: str) -> None:
    picture = scene(WHITE, ("circle", RED, 0.5))
    mask = render_mask(Shape(inner, "", 0.5, 0.5, 0.12), SIDE)
    picture[:, mask] = torch.tensor(SLATE, dtype=torch.uint8).view(3, 1)
    seen = look(picture, 2)
    assert len(seen.objects) == 2 and not any(each.hole for each in seen.objects)
    assert is_present("slate_triangle", seen) == (inner == "triangle")


@pytest.mark.parametrize("kind", ["star", "triangle", "square", "circle"])
def test_shapes_are_told_apart_on_blurred_and_noisy_pictures(kind: str) -> None:
    """As a small model draws them: soft edges, a colour that is a little off, noise."""
    random = np.random.default_rng(0)
    for x in (0.3, 0.4, 0.5):
        drawn = scene(WHITE, (kind, SLATE, x), ("ring", RED, 0.8)).numpy().astype(float)
        soft = np.stack([ndimage.gaussian_filter(channel, 0.8) for channel in drawn])
        noise = 9.0 * ndimage.gaussian_filter(random.normal(size=drawn.shape), (0, 1, 1))
        pixels = soft + random.normal(scale=3.0, size=(3, 1, 1)) + noise
        seen = look(torch.from_numpy(pixels.round().clip(0, 255).astype(np.uint8)), 2)
        assert is_present("ring", seen) and is_present("slate_triangle", seen) == (kind != "circle")
        assert sum(each.hole for each in seen.objects) == 1
        assert sum(each.angular for each in seen.objects) == (kind != "circle")
        judged = judge_beside(seen)
        assert (
            judged.first == (kind != "circle")
            and not judged.bound
            and not judged.swapped
            and not judged.blended
        )


def test_angular_is_what_no_ellipse_is() -> None:
    """However long and turned, and what the closed forms say of a rectangle and a triangle."""
    rows, columns = np.mgrid[-150:150, -150:150]
    for turn in (0.0, 0.4):
        x = columns * math.cos(turn) + rows * math.sin(turn)
        y = rows * math.cos(turn) - columns * math.sin(turn)
        for wide in (40, 80):
            assert measure._ellipticity((x / wide) ** 2 + (y / 50) ** 2 < 1) == pytest.approx(
                1.0, abs=0.005
            )
            rectangle = (abs(x) < wide) & (abs(y) < 50)
            triangle = (abs(x) / wide < (y + 50) / 100) & (y < 50)
            assert measure._ellipticity(rectangle) == pytest.approx(3 / math.pi, abs=0.01)
            assert measure._ellipticity(triangle) == pytest.approx(
                3 * math.sqrt(3) / (2 * math.pi), abs=0.01
            )


def test_rates_are_means() -> None:
    some = [Judgement(True, True, True, False, False), Judgement(True, False, False, False, True)]
    assert rates(some) == {
        "first": 1.0,
        "second": 0.5,
        "bound": 0.5,
        "swapped": 0.0,
        "blended": 0.5,
    }
    assert measure.is_between(MIXED, WINE, MAUVE) and not measure.is_between(WINE, WINE, MAUVE)


# ----------------------------------------------------------------------------
# The programs.


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, clip/, inversion/ with all drawn concepts, joint/ with matrices too, and place/ for
    two concepts alone."""
    root = make_world(tmp_path_factory.mktemp("world"))
    own = {
        name: weight.detach() * 1.5
        for name, weight in projections(load_base(root / "base").unet).items()
    }
    for folder, names, weights in (
        ("inversion", tuple(DRAWN), {}),
        ("joint", tuple(DRAWN), own),
        ("place", ("wine", "mauve"), own),
    ):
        concepts = [Concept(f"<new{k + 1}>", torch.randn(1, 16)) for k in range(len(names))]
        entries = [
            {"token": concept.token, "word": DRAWN[name].word, "phrase": DRAWN[name].phrase}
            for concept, name in zip(concepts, names, strict=True)
        ]
        save_learned(root / folder, CustomDiffusionResult(weights, concepts), {"concepts": entries})
    return root


METHODS = ("inversion", "inversion-cut-mix", "joint", "joint-cut-mix")


def arguments(world: Path, out: Path, *flags: Any) -> tuple[Any, ...]:
    parts = [
        part for name in METHODS for part in (f"--{name}", world / name.removesuffix("-cut-mix"))
    ]
    where = ("--base", world / "base", "--clip", world / "clip", "--output-dir", out / "pictures")
    return (
        *parts,
        *where,
        "--result",
        out / "result.json",
        "--images",
        2,
        "--steps",
        1,
        "--chunk-size",
        2,
        "--device",
        "cpu",
        *flags,
    )


def test_the_study_measures_every_method_and_the_figures_show_it(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = arguments(world, tmp_path, "--merged", world / "place")
    assert exit_code(study.main, study.Config, *flags) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["methods"]) == [
        study.UNTRAINED,
        study.INVERSION,
        study.INVERSION_CUT_MIX,
        study.JOINT,
        study.JOINT_CUT_MIX,
        study.MERGED,
    ]
    for method, found in result["methods"].items():
        merged = method == study.MERGED
        assert found["singles"].keys() == ({"wine", "mauve"} if merged else DRAWN.keys())
        assert found["pairs"].keys() == ({"place"} if merged else PAIRS.keys())
        for name, numbers in found["singles"].items():
            assert ("colour_error" in numbers) == bool(DRAWN[name].colour)
            assert (
                all(math.isfinite(value) for value in numbers.values())
                and {"image_score", "text_score"} <= numbers.keys()
            )
        for numbers in found["pairs"].values():
            assert len(numbers["bound_images"]) == 2 and 0.0 <= numbers["blended"] <= 1.0
    pictures = contents(tmp_path / "pictures")
    capsys.readouterr()
    assert exit_code(study.main, study.Config, *flags) == 0  # everything is kept
    assert capsys.readouterr().out.count("2 of 2 pictures are there already") == len(pictures) / 2
    assert contents(tmp_path / "pictures") == pictures

    assert make_figures(tmp_path, tmp_path / "figures") == 0
    assert sorted(contents(tmp_path / "figures")) == [
        "beside.png",
        "place.png",
        "place_ring.png",
        "single.png",
    ]


def make_figures(measured: Path, folder: Path) -> int:
    """The exit code of drawing the figures of what was measured."""
    flags = (
        "--pictures",
        measured / "pictures",
        "--results",
        measured / "result.json",
        "--output-dir",
        folder,
    )
    return exit_code(figures.main, figures.Config, *flags)


def test_what_is_not_given_is_left_out(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One result alone, of two concepts."""
    flags = arguments(world, tmp_path, "--clip", "none")
    flags = ("--joint", world / "place", *flags[flags.index("--base") :])
    assert exit_code(study.main, study.Config, *flags) == 0
    methods = json.loads((tmp_path / "result.json").read_text())["methods"]
    assert list(methods) == [study.UNTRAINED, study.JOINT]
    assert all(
        found["singles"].keys() == {"wine", "mauve"} and [*found["pairs"]] == ["place"]
        for found in methods.values()
    )
    assert make_figures(tmp_path, tmp_path / "out") == 0
    assert sorted(contents(tmp_path / "out")) == ["place.png", "single.png"]
    rest = flags[flags.index("--base") :]
    assert "there is nothing to measure" in refused(capsys, study.main, study.Config, *rest)


def test_the_untrained_placeholder_has_as_many_vectors_as_the_trained_one(
    world: Path, tmp_path: Path
) -> None:
    save_learned(
        tmp_path, CustomDiffusionResult({}, [Concept("<new1>", torch.ones(3, 16))]), {"vectors": 3}
    )
    assert (
        study.vectors_of(study.Config(joint=tmp_path)) == 3
        and study.vectors_of(study.Config(world / "place")) == 1
    )
    words = study.learn(load_base(world / "base"), None, {"wine": "<new1>"}, 3)
    assert words.concepts[0].vectors.shape == (3, 16)


def test_a_result_without_drawn_concepts_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = arguments(world, tmp_path)
    entry = {"token": "<new1>", "word": "dog", "phrase": "{} dog"}
    save_learned(
        tmp_path / "dog",
        CustomDiffusionResult({}, [Concept("<new1>", torch.ones(1, 16))]),
        {"concepts": [entry]},
    )
    said = refused(capsys, study.main, study.Config, *flags, "--joint", tmp_path / "dog")
    assert (
        said
        == f"{tmp_path / 'dog'} learned none of the drawn concepts wine, mauve, slate_triangle,"
        " ring"
    )
    assert not (tmp_path / "result.json").exists()
    assert "--images must be at least 1" in refused(
        capsys, study.main, study.Config, *flags, "--images", 0
    )


def test_the_script_is_sound(tmp_path: Path) -> None:
    """Its trainings, merges and measurements, in order, told by a stand-in for Python."""
    from tiny import environment, run_process

    echo = tmp_path / "python"
    echo.write_text('#!/bin/sh\necho "$@"\n')
    echo.chmod(0o755)
    command = ["bash", ROOT / "scripts" / "study_personalisation.sh", "--steps", "3"]
    result = run_process(command, env=environment(PYTHON=str(echo), RUNS_DIR="RUNS", BASE="BASE"))
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    trained = [line for line in lines if "personalisation.train" in line]
    assert len(trained) == 8 and sum("--cut-mix" in line for line in trained) == 2
    assert all("--base BASE" in line and line.endswith("--steps 3") for line in trained)
    assert all(
        ("--class-data-dir RUNS/personalisation/class_data" in line) == ("custom" in line)
        for line in trained
    )
    (measured,) = (line for line in lines if "personalisation.study.sweeps" in line)
    assert all(
        "checkpoints/clip_shapes" in line for line in [*trained, measured]
    )  # none would mean no scores
    assert (
        sum("personalisation.merge" in line for line in lines) == 1
        and "scripts.make_report" in lines[-1]
    )
