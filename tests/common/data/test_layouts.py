"""Scenes of several circles: fixed by their seed, drawn as fill50k's pairs are, and described in
its words."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.colour import CSS_COLOURS, colour_difference
from common.data.fill50k import read_prompts
from common.data.layouts import (
    KINDS,
    Description,
    caption,
    make_canvas,
    make_layouts,
    parse_caption,
    render_control,
    render_target,
    write_layouts,
)
from common.data.shapes import OUTLINE, Scene, Shape, render_mask
from common.errors import InputError
from common.images import read_rgb
from common.metrics.circles import fit_circles

LONE = Scene("teal", (Shape("circle", "peru", 0.5, 0.5, 0.25),))


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_are_fixed_by_their_seed(kind: str) -> None:
    scenes = make_layouts(kind)
    assert len(scenes) == 10 == len(set(scenes)) and scenes == make_layouts(kind)
    assert scenes[:3] == make_layouts(kind, count=3) and scenes != make_layouts(kind, seed=1)
    for scene in scenes:
        assert len(scene.shapes) == {"three": 3, "one_wide": 1}.get(kind, 2)
        assert list(scene.shapes) == sorted(scene.shapes, key=lambda shape: shape.x)
        colours = {scene.background, *(shape.colour for shape in scene.shapes)}
        assert len(colours) == (2 if kind == "two_shared" else len(scene.shapes) + 1)
        values = [CSS_COLOURS[name] for name in sorted(colours)]
        assert all(
            colour_difference(a, b) >= 10.0 for i, a in enumerate(values) for b in values[:i]
        )


def test_places_are_what_the_kind_says() -> None:
    for kind in KINDS:
        for scene in make_layouts(kind):
            discs = [(shape.x, shape.y, shape.radius) for shape in scene.shapes]
            gaps = [
                math.dist(a[:2], b[:2]) - a[2] - b[2]
                for i, a in enumerate(discs)
                for b in discs[:i]
            ]
            cut = [not all(r <= at <= 1.0 - r for at in (x, y)) for x, y, r in discs]
            assert all(abs(gap) < 1e-9 if kind == "touching" else gap >= 0.04 for gap in gaps)
            assert sum(cut) == (kind == "cut") and all(
                0.0 < at < 1.0 for x, y, _ in discs for at in (x, y)
            )


def circle_masks(scene: Scene, size: int = 512) -> Tensor:
    """The true mask of each shape, bool [K, size, size], in the order of the scene; no scene here
    has shapes that overlap."""
    return torch.stack([render_mask(shape, size) for shape in scene.shapes])


def test_both_sets_of_two_circles_have_the_same_places() -> None:
    for named, shared in zip(make_layouts("two"), make_layouts("two_shared"), strict=True):
        assert bool((circle_masks(named, 64) == circle_masks(shared, 64)).all())
        assert {shape.colour for shape in shared.shapes} == {named.shapes[0].colour}


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_show_the_scene(kind: str) -> None:
    for scene in make_layouts(kind, count=4):
        control, target, masks = render_control(scene), render_target(scene), circle_masks(scene)
        assert (
            control.shape == target.shape == (3, 512, 512)
            and control.dtype == target.dtype == torch.uint8
        )
        assert set(np.unique(control.numpy()).tolist()) == {0, 255} and bool(
            (control[0] == control[2]).all()
        )
        assert not (masks.sum(0) > 1).any() or kind == "touching"
        for shape, mask in zip(scene.shapes, masks, strict=True):
            own = target[:, mask].float()
            assert (own == torch.tensor(CSS_COLOURS[shape.colour])[:, None]).all(
                0
            ).float().mean() > 0.999
        ground = target[:, ~masks.any(0)]
        assert bool((ground == torch.tensor(CSS_COLOURS[scene.background])[:, None]).all())
        circles = fit_circles(control)
        true = [(512 * shape.x, 512 * shape.y, 512 * shape.radius) for shape in scene.shapes]
        assert np.allclose(circles, true, atol=0.5)


def test_the_outline_is_five_pixels_around_the_edge() -> None:
    """Centre 256, radius 128: the colour changes between pixels 127 and 128; three of five white
    pixels lie inside or two."""
    row = render_control(LONE)[0, 256]
    white = row.nonzero().flatten().tolist()
    assert white == [126, 127, 128, 129, 130, 381, 382, 383, 384, 385] or len(white) in (9, 10, 11)
    assert abs(np.mean(white[: len(white) // 2]) + 0.5 - 128.0) <= 0.5
    area = render_control(LONE)[0].bool().sum().item()
    assert area == pytest.approx(2.0 * math.pi * 128.0 * 5.0, rel=0.01)
    assert circle_masks(LONE).sum().item() == pytest.approx(math.pi * 128.0**2, rel=0.002)


def test_a_canvas_holds_small_circles_of_one_colour() -> None:
    """Each fits into one of 4 x 4 pictures, and its outline is as thick as in a picture."""
    scene = make_canvas(7, 4)
    assert scene == make_canvas(7, 4) != make_canvas(7, 4, seed=1) and len(scene.shapes) == 7
    discs = [(shape.x, shape.y, shape.radius) for shape in scene.shapes]
    assert all(0.05 <= r <= 0.1 and r < x < 1.0 - r and r < y < 1.0 - r for x, y, r in discs)
    assert all(
        math.dist(a[:2], b[:2]) > a[2] + b[2] + 0.01 for i, a in enumerate(discs) for b in discs[:i]
    )
    colours = {shape.colour for shape in scene.shapes}
    assert len(colours) == 1 and scene.background not in colours
    white = render_control(scene, 1024, OUTLINE / 4)[0].bool().sum().item()
    length = sum(2.0 * math.pi * 1024 * r for _, _, r in discs)
    assert white == pytest.approx(length * 1024 * OUTLINE / 4, rel=0.1)


def test_only_circles_have_such_control_pictures() -> None:
    with pytest.raises(ValueError, match="only circles"):
        render_control(Scene("teal", (Shape("star", "peru", 0.5, 0.5, 0.25),)))


def test_prompts_say_what_the_scene_shows() -> None:
    named, shared = make_layouts("two", count=1)[0], make_layouts("two_shared", count=1)[0]
    (a, b), ground = (shape.colour for shape in named.shapes), named.background
    assert caption(named) == f"{a} circle next to {b} circle with {ground} background"
    assert caption(shared) == f"{a} circle next to {a} circle with {ground} background"
    assert caption(shared, "count") == f"two {a} circles with {ground} background"
    assert (
        caption(shared, "single")
        == caption(LONE.__class__(ground, shared.shapes[:1]))
        == f"{a} circle with {ground} background"
    )
    with pytest.raises(ValueError, match="one colour"):
        caption(named, "count")
    assert parse_caption(caption(named)) == Description((a, b), ground, 2)
    assert parse_caption(caption(shared)) == Description((a, a), ground, 2)
    assert parse_caption(caption(shared, "count")) == Description((a,), ground, 2)
    assert parse_caption(caption(shared, "single")) == Description((a,), ground, None)
    assert parse_caption("three red circles with teal background") == Description(
        ("red",), "teal", 3
    )
    assert parse_caption(caption(make_layouts("three", count=1)[0])).count == 3


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "red circle",
        "red square with teal background",
        "reddish circle with teal background",
        "red circle with teal",
        "two red circle with teal background",
        "red circles with teal background",
        "red circle next to with teal background",
        "two red circles next to lime circle with teal background",
    ],
)
def test_other_prompts_are_refused(prompt: str) -> None:
    with pytest.raises(InputError, match="is not of the form COLOUR circle"):
        parse_caption(prompt)


def test_layouts_are_written_as_fill50k_is(tmp_path: Path) -> None:
    scenes = make_layouts("two_shared", count=2)
    path = write_layouts(tmp_path / "set", scenes, "count")
    pairs = read_prompts(path, tmp_path / "set" / "source", tmp_path / "set" / "target")
    assert [pair.prompt for pair in pairs] == [caption(scene, "count") for scene in scenes]
    assert bool((pairs[1].read_source() == render_control(scenes[1])).all())
    assert bool((read_rgb(pairs[1].target) == render_target(scenes[1])).all())
    assert json.loads(path.read_text().splitlines()[0])["source"] == "source/0.png"
    assert len([file for file in (tmp_path / "set").rglob("*") if file.is_file()]) == 5
