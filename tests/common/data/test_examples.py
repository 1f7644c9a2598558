"""Drawn and real pictures with captions and control images, as the small models train on them."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_pairs import write_pairs

from common.colour import CSS_COLOURS
from common.data.examples import (
    WORDINGS,
    DrawnCircles,
    DrawnScenes,
    RealPairs,
    describe,
    described_scenes,
    drawn_circles,
    drawn_examples,
    in_memory,
)
from common.data.layouts import parse_caption, render_control
from common.data.shapes import Scene, Shape, draw_circle
from common.errors import InputError
from common.images import read_rgb, resize, write_png
from common.metrics.segmentation import iou, object_mask
from common.seeds import derive_seed


def test_an_example_depends_on_the_seed_and_its_own_number() -> None:
    for draw in (drawn_examples, drawn_circles):
        few, more, other = draw(3, 32, 5), draw(6, 32, 5), draw(3, 32, 6)
        assert (
            len(more) == 6
            and few.images.shape == (3, 3, 32, 32)
            and few.images.dtype == torch.uint8
        )
        assert torch.equal(few.images, more.images[:3]) and few.captions == more.captions[:3]
        assert few.captions != other.captions


def test_drawn_scenes_have_one_to_three_shapes_in_every_wording() -> None:
    captions = drawn_examples(80, 16, 0).captions
    several = sum("next to" in caption or "s " in caption + " " for caption in captions)
    assert 39 <= several <= 65  # 65 % of 80, give or take 3 deviations
    assert any("background" not in caption for caption in captions)
    for start in ("a photo of a ", "a ", "two "):
        assert any(caption.startswith(start) for caption in drawn_examples(300, 8, 0).captions)
    for kind in ("circle", "square", "triangle", "star"):
        assert any(kind in caption for caption in captions)
    alone = drawn_examples(20, 16, 0, several_fraction=0.0).captions
    assert not any("next to" in caption for caption in alone)
    assert drawn_examples(2, 16, 0).hints is None


def scenes_of(count: int = 240, **fractions: float) -> list[Scene]:
    return [scene for scene, _ in described_scenes(count, 0, several_fraction=1.0, **fractions)]


def test_some_scenes_share_a_colour_and_some_of_these_are_counted() -> None:
    """Two circles of one colour are asked for later, and a base that never saw such a scene would
    not draw them."""

    def shared(**fractions: float) -> int:
        scenes = scenes_of(120, **fractions)
        return sum(len({shape.colour for shape in scene.shapes}) == 1 for scene in scenes)

    assert 11 <= shared() <= 37  # a fifth of 120, give or take 3 deviations
    assert shared(shared_fraction=0.0) == 0
    counted = drawn_examples(
        60, 8, 0, several_fraction=1.0, twin_fraction=1.0, shared_fraction=1.0
    ).captions
    named = [re.search(r"\b(two|three) .* circles\b", caption) for caption in counted]
    assert 18 <= sum(map(bool, named)) <= 42  # half of 60, give or take 3 deviations
    assert all(
        "circle next to" in text for text, name in zip(counted, named, strict=True) if not name
    )


def test_some_scenes_are_circles_alone_and_some_have_three_shapes() -> None:
    def circles(**fractions: float) -> int:
        return sum({s.kind for s in scene.shapes} == {"circle"} for scene in scenes_of(**fractions))

    assert 51 <= circles() <= 100  # 30 % of 240 and a few more, give or take 3 deviations
    assert circles(twin_fraction=0.0) <= 27
    assert circles(twin_fraction=1.0) == 240
    assert {len(scene.shapes) for scene in scenes_of(60)} == {2, 3}
    assert {len(scene.shapes) for scene in scenes_of(60, three_fraction=0.0)} == {2}


def test_shapes_of_a_scene_are_named_from_left_to_right() -> None:
    for scene in scenes_of(60):
        places = [shape.x for shape in scene.shapes]
        assert places == sorted(places)


def test_pairs_of_several_circles_have_their_outlines() -> None:
    data = DrawnCircles(40, 32, 0, several_fraction=0.5)
    several = [k for k, caption in enumerate(data.captions) if "next to" in caption]
    assert 10 <= len(several) <= 30  # half of 40, give or take 3 deviations
    alone = DrawnCircles(40, 32, 0)
    assert not any("next to" in caption for caption in alone.captions)
    assert all(data[k].hint.max() > 0 for k in several)


def test_pairs_without_outlines_are_blank_and_have_their_captions() -> None:
    usual, data = DrawnCircles(40, 16, 0), DrawnCircles(40, 16, 0, blank_fraction=0.5)
    blank = [k for k in range(40) if data[k].hint.max() == 0]
    assert 10 <= len(blank) <= 30  # half of 40, give or take 3 deviations
    assert data.captions == usual.captions and data.hash() != usual.hash()
    for k, (example, before) in enumerate(zip(data, usual, strict=False)):
        flat = (example.image == example.image[:, :1, :1]).all()
        assert flat if k in blank else (example.image == before.image).all()


def test_drawn_circles_lie_as_the_real_ones_do() -> None:
    """The real testing circles: centres 0.20 to 0.80, radii 0.13 to 0.50 of the side, half of them
    touching the border."""
    circles = [draw_circle(np.random.default_rng(k)).shapes[0] for k in range(400)]
    for values, low, high in (
        ([c.x for c in circles], 0.2, 0.8),
        ([c.y for c in circles], 0.2, 0.8),
        ([c.radius for c in circles], 0.1, 0.5),
    ):
        assert low <= min(values) < low + 0.02 and high - 0.02 < max(values) <= high
    touching = sum(not all(c.radius < at < 1.0 - c.radius for at in (c.x, c.y)) for c in circles)
    assert 160 <= touching <= 240


def test_the_wordings() -> None:
    scene = Scene(
        "blue", (Shape("circle", "red", 0.5, 0.5, 0.2), Shape("star", "old lace", 0.2, 0.2, 0.1))
    )
    assert (
        describe(scene, WORDINGS[0])
        == scene.caption
        == "red circle next to old lace star with blue background"
    )
    assert describe(scene, WORDINGS[-1]) == "a photo of a red circle next to old lace star"


def test_a_circles_outline_lies_on_its_edge_and_its_caption_names_its_colours() -> None:
    examples = drawn_circles(12, 64, 0)
    assert examples.hints.shape == (12, 1, 64, 64) and examples.hints.dtype == torch.uint8
    for image, hint, caption in zip(
        examples.images, examples.hints[:, 0], examples.captions, strict=True
    ):
        said = parse_caption(caption)
        outline = hint > 64
        assert 20 < int(outline.sum()) < 400
        plain = {tuple(colour) for colour in image[:, hint == 0].T.tolist()}
        assert plain <= {
            CSS_COLOURS[said.colours[0]],
            CSS_COLOURS[said.background],
        }  # all mixtures lie below the outline
        mixed = (image != torch.tensor(CSS_COLOURS[said.background])[:, None, None]).any(0) & (
            image != torch.tensor(CSS_COLOURS[said.colours[0]])[:, None, None]
        ).any(0)
        assert not (mixed & (hint == 0)).any()


def test_drawn_and_real_control_images_are_alike() -> None:
    """The same scenes as files of 512x512 and as drawn at once: the network must not see a
    difference in thickness."""
    drawn = drawn_circles(4, 64, 7).hints
    for k, hint in enumerate(drawn):
        scene = draw_circle(np.random.default_rng(derive_seed(7, k)))
        real = resize(render_control(scene), 64, "area")[:1]
        assert (hint.float() - real.float()).abs().mean() < 2.0
        assert 0.85 < hint.float().sum() / real.float().sum() < 1.15


def test_real_pairs_are_averaged_to_size(tmp_path: Path) -> None:
    write_pairs(tmp_path / "fill50k" / "training", 2)
    examples = in_memory(RealPairs(tmp_path / "fill50k", 64))
    assert examples.images.shape == (2, 3, 64, 64) and examples.hints.shape == (2, 1, 64, 64)
    assert all(len(parse_caption(caption).colours) == 1 for caption in examples.captions)
    whole = object_mask(read_rgb(tmp_path / "fill50k" / "training" / "target" / "0.png"))
    assert iou(object_mask(examples.images[0]), whole) > 0.97
    assert in_memory(RealPairs(tmp_path / "fill50k", 64, hints=False)).hints is None
    with pytest.raises(InputError, match="the pairs of fill50k are not there"):
        RealPairs(tmp_path, 64)


def test_a_pair_that_cannot_be_read_is_named_by_its_line(tmp_path: Path) -> None:
    write_pairs(tmp_path / "training", 3)
    prompts = tmp_path / "training" / "prompt.json"
    prompts.write_text("\n" + prompts.read_text())  # an empty line counts too
    (tmp_path / "training" / "source" / "1.png").write_bytes(b"no picture")
    pairs = RealPairs(tmp_path, 64)
    assert pairs[0].hint is not None
    with pytest.raises(InputError, match=r"prompt\.json, line 3: .*source/1\.png is not a"):
        pairs[1]


def test_a_coloured_control_image_keeps_its_colours(tmp_path: Path) -> None:
    write_pairs(tmp_path / "training", 1)
    picture = torch.zeros(3, 512, 512, dtype=torch.uint8)
    picture[0, :256] = 200
    write_png(tmp_path / "training" / "source" / "0.png", picture)
    assert torch.equal(RealPairs(tmp_path, 512)[0].hint, picture)


def test_sums_of_sets(tmp_path: Path) -> None:
    write_pairs(tmp_path / "training", 2)
    drawn, real = DrawnCircles(3, 64, 0), RealPairs(tmp_path, 64)
    both = drawn + real
    assert len(both) == 5 and both.captions == drawn.captions + real.captions
    assert torch.equal(both[2].image, drawn[2].image) and torch.equal(both[4].hint, real[1].hint)
    with pytest.raises(ValueError, match="64 and of 16 pixels"):
        drawn + DrawnCircles(1, 16, 0)


def test_the_hash_tells_data_apart(tmp_path: Path) -> None:
    write_pairs(tmp_path / "training", 2)
    real = RealPairs(tmp_path, 64)
    hashes = [
        DrawnCircles(2, 64, 0).hash(),
        DrawnCircles(2, 64, 1).hash(),
        DrawnCircles(3, 64, 0).hash(),
        DrawnScenes(2, 64, 0).hash(),
        real.hash(),
        RealPairs(tmp_path, 64, hints=False).hash(),
        (DrawnCircles(1, 64, 0) + real).hash(),
    ]
    assert len(set(hashes)) == len(hashes) and RealPairs(tmp_path, 64).hash() == real.hash()
    both = DrawnCircles(1, 64, 0) + real
    before = [both.stamp(k) for k in range(3)]
    (tmp_path / "training" / "target" / "0.png").write_bytes(b"other")
    after = [both.stamp(k) for k in range(3)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]
    assert both.where(1).endswith("prompt.json, line 1") and both.hash() == hashes[-1]
