"""The study of learned concepts: what is measured on pictures whose content is known, and the
programs end to end."""

import dataclasses
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
from common.data.shapes import Shape, render_coverage
from common.files import ROOT, write_json
from common.latent.load import load_base
from p3_clip.personalisation.concepts import Concept
from p3_clip.personalisation.custom_diffusion import CustomDiffusionResult, projections
from p3_clip.personalisation.model import save_learned
from p3_clip.personalisation.sentences import ALONE, HARDER, OFFERED, PAIRS, SENTENCES
from p3_clip.personalisation.study import figures, report
from p3_clip.personalisation.study import sweeps as study
from p3_clip.personalisation.study.measure import (
    Judgement,
    colour_error,
    is_between,
    judge,
    look,
    look_for,
    rates,
)

RED, WHITE, PINK = (CSS_COLOURS[name] for name in ("red", "white", "pink"))
MIXED, BETWEEN = (
    tuple(round((a + b) / 2) for a, b in zip(*colours, strict=True))
    for colours in ((WINE, MAUVE), (WINE, SLATE))
)
SIDE = 128


def scene(background: Any, *objects: Any, blur: float = 0.0, noise: float = 0.0) -> Tensor:
    """uint8 [3, SIDE, SIDE] with (kind, colour, x[, radius]) objects."""
    random = np.random.default_rng(len(objects))
    picture = np.tile(np.array(background, float)[:, None, None], (1, SIDE, SIDE))
    for kind, colour, x, *radius in objects:
        circle = Shape("circle", "", x, 0.5, *(radius or [0.2]))
        shape = circle if kind == "ring" else dataclasses.replace(circle, kind=kind, angle=0.2)
        covered = render_coverage(shape, SIDE).numpy() / 255.0
        if kind == "ring":
            hole = dataclasses.replace(circle, radius=HOLE * circle.radius)
            covered -= render_coverage(hole, SIDE).numpy() / 255.0
        picture += covered * (np.array(colour, float)[:, None, None] - picture)
    soft = np.stack([ndimage.gaussian_filter(part, blur, mode="nearest") for part in picture])
    soft += 2.0 * noise * ndimage.gaussian_filter(random.normal(size=soft.shape), (0, 0.7, 0.7))
    return torch.from_numpy(soft.round().clip(0, 255).astype(np.uint8))


def judged(key: str, picture: Tensor) -> Judgement:
    return judge(SENTENCES[key], look_for(SENTENCES[key], picture))


@pytest.mark.parametrize("key", SENTENCES)
def test_a_right_picture_of_every_sentence_is_in_place(key: str) -> None:
    """As a small model draws them: soft edges and noise, in either order from left to right."""
    sentence = SENTENCES[key]
    one = len(sentence.objects) == 1
    right = ((0.5, 0.3),) if one else ((0.27, 0.2), (0.75, 0.16))
    for places in {right, right[::-1]}:
        objects = [
            (asked.shape, asked.colour or CSS_COLOURS["lime"], *place)
            for asked, place in zip(sentence.objects, places, strict=True)
        ]
        picture = scene(sentence.background or PINK, *objects, blur=0.7, noise=4.0)
        wanted = len(sentence.objects) + (sentence.background is not None)
        assert judged(key, picture) == Judgement(True, (True,) * wanted, False, False)


@pytest.mark.parametrize("name", DRAWN)
def test_every_photo_of_a_concept_is_in_place(name: str) -> None:
    for index in (0, 3, 7):
        seen = look_for(ALONE[name], draw_photo(name, index))
        assert judge(ALONE[name], seen).bound
        if colour := DRAWN[name].colour:
            assert colour_error(colour, seen, of_background=name == "mauve") < 1.0
        other = next(each for each in DRAWN if each != name)
        assert not judge(ALONE[other], seen).bound


TRIANGLE, CIRCLE = ("triangle", SLATE, 0.25), ("circle", WINE, 0.75)


@pytest.mark.parametrize(
    ("key", "background", "objects", "present"),
    [
        ("beside", WHITE, [TRIANGLE, ("triangle", SLATE, 0.75)], (True, False)),
        ("beside", WHITE, [("circle", WINE, 0.25), CIRCLE], (False, True)),
        ("beside", WHITE, [("star", SLATE, 0.25), CIRCLE], (False, True)),
        ("beside", WHITE, [("circle", SLATE, 0.25), CIRCLE], (False, True)),
        ("beside", WHITE, [TRIANGLE, ("circle", RED, 0.75)], (True, False)),
        ("beside", WHITE, [TRIANGLE], (True, False)),
        ("beside", WHITE, [TRIANGLE, CIRCLE, ("star", RED, 0.5, 0.1)], (True, True)),
        (
            "beside",
            WHITE,
            [
                ("triangle", SLATE, 0.2, 0.16),
                ("circle", WINE, 0.8, 0.16),
                ("circle", WINE, 0.5, 0.08),
            ],
            (True, True),
        ),
        ("place", WHITE, [("circle", WINE, 0.5)], (True, False)),
        ("place", MAUVE, [("square", WINE, 0.5)], (False, True)),
        ("place", MAUVE, [("circle", WINE, 0.25), ("circle", WINE, 0.75)], (True, True)),
        ("place_ring", MAUVE, [("circle", GOLD, 0.5)], (False, True)),
        ("place_ring", WHITE, [("ring", GOLD, 0.5)], (True, False)),
        ("ring_alone", WHITE, [("square", GOLD, 0.5)], (False,)),
        ("mauve_alone", MAUVE, [("star", GOLD, 0.5)], (False, True)),
        ("navy_ring", WHITE, [("ring", GOLD, 0.5)], (False,)),
        ("wine", PINK, [("circle", WINE, 0.5)], (True, False)),
        ("three", MAUVE, [TRIANGLE], (True, False, True)),
        ("three", WHITE, [TRIANGLE, CIRCLE], (True, True, False)),
    ],
)
def test_what_was_not_asked_for_is_not_in_place(
    key: str, background: Any, objects: Any, present: tuple[bool, ...]
) -> None:
    assert judged(key, scene(background, *objects)) == Judgement(False, present, False, False)


@pytest.mark.parametrize("key", SENTENCES)
def test_an_empty_picture_shows_nothing(key: str) -> None:
    judgement = judged(key, scene(MAUVE))
    assert not judgement.bound and not any(judgement.present)
    assert not judgement.swapped and not judgement.blended
    seen = look_for(SENTENCES[key], scene(MAUVE))
    assert colour_error(MAUVE, seen, of_background=True) == colour_error(WINE, seen) == 50.0


@pytest.mark.parametrize(
    ("key", "background", "objects"),
    [
        ("place", WINE, [("circle", MAUVE, 0.5)]),
        ("place_ring", WHITE, [("ring", MAUVE, 0.5)]),
        ("beside", WHITE, [("triangle", WINE, 0.25), ("circle", SLATE, 0.75)]),
        ("three", WINE, [("triangle", SLATE, 0.25), ("circle", MAUVE, 0.75)]),
    ],
)
def test_colours_in_each_others_places_are_swapped(key: str, background: Any, objects: Any) -> None:
    judgement = judged(key, scene(background, *objects))
    assert judgement.swapped and not judgement.bound


@pytest.mark.parametrize(
    ("key", "picture"),
    [
        ("place", scene(WHITE, ("circle", MIXED, 0.5))),
        ("beside", scene(WHITE, ("triangle", BETWEEN, 0.5))),
    ],
)
def test_a_colour_between_two_asked_for_is_blended(key: str, picture: Tensor) -> None:
    judgement = judged(key, picture)
    assert judgement.blended and not judgement.bound and not any(judgement.present)


def test_an_open_ring_is_none() -> None:
    picture = scene(WHITE, ("ring", GOLD, 0.5, 0.3))
    assert judged("ring_alone", picture).bound
    picture[:, 58:70, 64:] = 255
    assert not judged("ring_alone", picture).bound


@pytest.mark.parametrize("inner", ["triangle", "circle"])
def test_a_disc_with_another_object_on_it_is_no_ring(inner: str) -> None:
    picture = scene(WHITE, ("circle", RED, 0.5, 0.3), (inner, SLATE, 0.5, 0.16))
    seen = look(picture, 2)
    assert {each.shape for each in seen.objects} == {"circle", inner}
    assert not judged("ring_alone", picture).bound


def test_rates_are_means() -> None:
    some = [
        Judgement(True, (True, True), False, False),
        Judgement(False, (True, False), False, True),
    ]
    assert rates(some) == {
        "bound": 0.5,
        "present": [1.0, 0.5],
        "swapped": 0.0,
        "blended": 0.5,
        "bound_images": [True, False],
    }
    assert is_between(MIXED, WINE, MAUVE) and not is_between(WINE, WINE, MAUVE)


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


METHODS = {
    "inversion": "inversion",
    "inversion-cut-mix": "inversion",
    "joint": "joint",
    "joint-cut-mix": "joint",
    "joint-collage": "joint",
}


def arguments(world: Path, out: Path, *flags: Any) -> tuple[Any, ...]:
    parts = [part for name, folder in METHODS.items() for part in (f"--{name}", world / folder)]
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
        study.JOINT_COLLAGE,
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
        assert found["offered"].keys() == {
            key for key, each in OFFERED.items() if {*each.names} <= found["singles"].keys()
        }
        assert found["harder"].keys() == (set() if merged else HARDER.keys())
        for part in ("offered", "pairs", "harder"):
            for key, numbers in found[part].items():
                wanted = SENTENCES[key]
                parts = len(wanted.objects) + (wanted.background is not None)
                assert len(numbers["bound_images"]) == 2 and len(numbers["present"]) == parts
                assert math.isfinite(numbers["image_score"] + numbers["text_score"])
    pictures = contents(tmp_path / "pictures")
    capsys.readouterr()
    measures = json.loads(pictures["measures.json"])
    write_json(tmp_path / "pictures/measures.json", {**measures, "rows": measures["rows"][:-1]})
    assert exit_code(study.main, study.Config, *flags) == 0  # everything but this row is kept
    assert capsys.readouterr().out.count("2 of 2 pictures are there already") == 1
    assert contents(tmp_path / "pictures") == pictures
    assert json.loads((tmp_path / "result.json").read_text()) == result

    assert make_figures(tmp_path, tmp_path / "figures") == 0
    assert sorted(contents(tmp_path / "figures")) == [
        "beside.png",
        "harder.png",
        "place.png",
        "place_ring.png",
        "single.png",
    ]


def test_the_tables_show_what_was_measured() -> None:
    """Results from before the measure was tightened have no harder sentences and other keys."""
    pair = {"prompt": "a <ring>", "bound": 0.5, "swapped": 0.0, "blended": 0.0}
    old = {"singles": {}, "pairs": {"place": {**pair, "first": 1.0, "second": 0.25}}}
    scores = {"image_score": 71.0, "text_score": 61.5}
    new = {
        "singles": {},
        "pairs": {"place": {**pair, "present": [1.0, 0.25], **scores}},
        "harder": {"three": {**pair, **scores}},
    }
    make = report.TABLES
    before, after = ({"p3_personalisation": {"methods": {"joint": x}}} for x in (old, new))
    assert make["concepts_place"](before).endswith("| joint | 100 % | 25 % | 50 % | 0 % | 0 % |")
    assert make["concepts_place"](after).endswith(
        "| 100 % | 25 % | 50 % | 0 % | 0 % | 71.0 | 61.5 |"
    )
    assert make["concepts_harder"](before) == report.NOT_MEASURED
    assert make["concepts_harder"](after).endswith("| `a <ring>` | 50 % |")
    assert make["concepts_harder_text"](after).endswith("| `a <ring>` | 61.5 |")


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
    assert len(trained) == 9 and sum("--cut-mix" in line for line in trained) == 3
    assert all("--base BASE" in line and line.endswith("--steps 3") for line in trained)
    assert all(
        ("--class-images drawn" in line) == ("custom" in line) and "--vectors 3" in line
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
