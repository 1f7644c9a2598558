"""Colours against published values, and drawn scenes against their descriptions."""

import numpy as np
import torch
from PIL import ImageColor
from skimage.color import deltaE_ciede2000

from common.colour import CSS_COLOURS, colour_difference, colour_name, nearest_name, to_lab
from common.data.shapes import KINDS, Scene, Shape, draw_scene, render, render_mask


def test_every_css_colour_has_one_name() -> None:
    assert len(CSS_COLOURS) == len(set(CSS_COLOURS.values())) == 139
    assert set(CSS_COLOURS.values()) == {ImageColor.getrgb(name) for name in ImageColor.colormap}
    assert all(nearest_name(rgb) == name for name, rgb in CSS_COLOURS.items())


def test_every_spelling_is_its_colour() -> None:
    """Of all 148 CSS names: joined and in words, in any letter case, grey as gray."""
    for css in ImageColor.colormap:
        name = colour_name(css)
        assert name and CSS_COLOURS[name] == ImageColor.getrgb(css)
        for spelling in (name, name.upper(), name.replace(" ", "-"), name.replace(" ", "")):
            assert colour_name(spelling) == name
        if "gray" in name:
            assert colour_name(name.replace("gray", "Grey")) == name
    assert colour_name("medium aquamarine") == colour_name("medium aqua marine")
    assert colour_name("cyan") == "aqua" and colour_name("magenta") == "fuchsia"
    assert colour_name("light  sky\u00a0blue") == "light sky blue"
    assert [colour_name(text) for text in ("", "reddish", "red circle", "two red")] == [None] * 4


def test_differences_match_published_values() -> None:
    # Pairs 1 and 25 of Table 1 of Sharma, Wu and Dalal 2005, "The CIEDE2000 color-difference
    # formula".
    assert abs(deltaE_ciede2000([50.0, 2.6772, -79.7751], [50.0, 0.0, -82.7485]) - 2.0425) < 1e-4
    assert (
        abs(deltaE_ciede2000([60.2574, -34.0099, 36.2677], [60.4626, -34.1751, 39.4387]) - 1.2644)
        < 1e-4
    )
    assert np.allclose(to_lab([255, 255, 255]), [100.0, 0.0, 0.0], atol=0.02)
    assert colour_difference([10, 200, 30], [10, 200, 30]) == 0.0
    azure, others = [240, 255, 255], [[224, 255, 255], [0, 0, 0]]
    assert np.allclose(
        colour_difference(azure, others), [colour_difference(azure, other) for other in others]
    )


def test_a_picture_shows_what_its_scene_says() -> None:
    scene = Scene(
        "old lace", (Shape("circle", "peru", 0.3, 0.3, 0.2), Shape("square", "teal", 0.7, 0.7, 0.2))
    )
    assert scene.caption == "peru circle next to teal square with old lace background"
    picture = render(scene, 64)
    for x, y, colour in ((19, 19, "peru"), (45, 45, "teal"), (60, 3, "old lace")):
        assert tuple(picture[:, y, x].tolist()) == CSS_COLOURS[colour]
    # The area of a disc, in pixels.
    assert abs(render_mask(scene.shapes[0], 64).sum().item() - np.pi * (0.2 * 64) ** 2) < 12


def test_scenes_repeat_with_the_seed_and_respect_the_forbidden() -> None:
    forbidden = {(colour, "star") for colour in list(CSS_COLOURS)[:100]}
    scenes = [
        draw_scene(np.random.default_rng(seed), count=1 + seed % 2, forbidden=forbidden)
        for seed in range(200)
    ]
    again = [
        draw_scene(np.random.default_rng(seed), count=1 + seed % 2, forbidden=forbidden)
        for seed in range(200)
    ]
    assert scenes == again
    shapes = [shape for scene in scenes for shape in scene.shapes]
    assert {shape.kind for shape in shapes} == set(KINDS)
    assert not any((shape.colour, shape.kind) in forbidden for shape in shapes)
    for scene in scenes[1::2]:
        overlap = torch.stack([render_mask(shape, 64) for shape in scene.shapes]).sum(0)
        assert overlap.max() == 1


def test_pairs_from_left_to_right_are_clearly_so_and_none_is_smaller_than_asked() -> None:
    scenes = [
        draw_scene(np.random.default_rng(k), count=2, smallest=0.16, left_to_right=True)
        for k in range(200)
    ]
    assert all(second.x - first.x >= 0.1 for first, second in (scene.shapes for scene in scenes))
    radii = [shape.radius for scene in scenes for shape in scene.shapes]
    assert 0.16 <= min(radii) < 0.165 and 0.235 < max(radii) <= 0.24
    unordered = [draw_scene(np.random.default_rng(k), count=2) for k in range(200)]
    assert (
        60
        <= sum(first.x > second.x for first, second in (scene.shapes for scene in unordered))
        <= 140
    )
