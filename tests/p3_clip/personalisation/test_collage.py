"""Views of photos with plain backgrounds: shrunk ones, collages, and where they show a concept."""

import numpy as np
import pytest
import torch

from common.colour import CSS_COLOURS, colour_difference
from common.data.concepts import GOLD, HOLE, MAUVE, WINE, draw_photo
from common.data.shapes import KINDS, Shape
from common.metrics.segmentation import separate
from common.metrics.shapes import recognise
from p3_clip.personalisation.collage import (
    background_colour,
    collage_view,
    cut_out,
    known_shape,
)
from p3_clip.personalisation.photos import _latent_weights, cut_mix_views, make_views, with_region

SIDE = 64


def grey_levels(image: torch.Tensor) -> torch.Tensor:
    return image * 127.5 + 127.5


def test_the_cut_out_is_the_object_without_its_background() -> None:
    """Not even along its edge, where the photo's pixels are mixed with white."""
    thing = cut_out(draw_photo("ring", 0))
    assert colour_difference(thing.colour, GOLD) < 1.0
    assert recognise(_at_512(thing.mask)).shows("ring")
    inside = thing.image[:, thing.mask.bool()]
    assert (inside - torch.tensor(GOLD)[:, None]).abs().max() <= 4.0
    assert cut_out(torch.full((3, 40, 40), 90, dtype=torch.uint8)) is None
    assert colour_difference(background_colour(draw_photo("mauve", 2)), MAUVE) < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_a_known_shape_is_placed_as_if_it_were_cut_out(kind: str) -> None:
    thing = known_shape(Shape(kind, "teal", 0.2, 0.9, 0.1, 0.3))
    assert thing.colour == CSS_COLOURS["teal"]
    assert recognise(thing.mask > 0.5).shows(kind)
    things = [thing, cut_out(draw_photo("ring", 0))]
    view = collage_view(things, MAUVE, SIDE, np.random.default_rng(0))
    inside = grey_levels(view.image)[:, (view.regions[0] > 0.99) & (view.regions[2] < 0.01)]
    assert (inside - torch.tensor(CSS_COLOURS["teal"])[:, None]).abs().max() <= 1.0


def _at_512(mask: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(mask[None, None], (512, 512))[0, 0] > 0.5


@pytest.mark.parametrize("names", [("ring",), ("ring", "wine")])
def test_a_collage_shows_each_thing_whole_on_the_new_background(names: tuple[str, ...]) -> None:
    things = [cut_out(draw_photo(name, 1)) for name in names]
    random = np.random.default_rng(0)
    view = collage_view(things, MAUVE, SIDE, random)
    assert view.image.shape == (3, SIDE, SIDE) and view.mask.all()
    assert view.regions.shape == (len(names) + 1, SIDE, SIDE)
    pixels, centres, ground = grey_levels(view.image), [], view.regions[-1]
    for name, thing, region in zip(names, things, view.regions, strict=False):
        own = (region > 0.99) & (ground < 0.01)  # without the hole
        colour = pixels[:, own].median(1).values
        assert colour_difference(tuple(colour.tolist()), thing.colour) < 1.0
        (part,) = separate((region > 0.5) & (ground < 0.5))
        assert recognise(_at_512(part.float())).shows("circle" if name == "wine" else "ring")
        assert recognise(_at_512((region > 0.5).float())).shows("circle")
        centres.append(float((part.nonzero()[:, 1]).float().mean()))
    assert centres == sorted(centres)
    assert torch.allclose(view.regions.amax(0), torch.ones(SIDE, SIDE), atol=0.51)  # at edges
    ground = pixels[:, view.regions[-1] > 0.99]
    assert (ground - torch.tensor(MAUVE)[:, None]).abs().max() <= 1.0
    again = collage_view(things, MAUVE, SIDE, np.random.default_rng(0))
    assert torch.equal(view.image, again.image)


def test_shrunk_views_go_on_with_the_background() -> None:
    """Every second one is whole; all show the object whole, and the loss counts everywhere."""
    photo = with_region(draw_photo("wine", 1))
    views = make_views(photo, SIDE, "shrink", 12, torch.Generator().manual_seed(0))
    assert len(views) == 12
    areas = [view.regions[0].sum().item() for view in views]
    assert max(areas[::2]) - min(areas[::2]) < 0.01 * areas[0]
    assert all(0.1 * areas[0] < area <= 1.01 * areas[0] for area in areas[1::2])
    assert max(areas[1::2]) > 1.5 * min(areas[1::2])
    for view in views:
        assert view.mask.all() and view.words == ("",)
        pixels = grey_levels(view.image)
        for region, colour in (
            (view.regions[0] > 0.99, WINE),
            (view.regions[0] < 0.01, CSS_COLOURS["pink"]),
        ):
            median = tuple(pixels[:, region].median(1).values.tolist())
            assert colour_difference(median, colour) < 1.0


def test_regions_follow_their_photos() -> None:
    """That of an object holds its holes, that of a background all but the object; in the cut-mix
    each stays in its half."""
    photo, other = with_region(draw_photo("ring", 0)), with_region(draw_photo("wine", 0))
    ground = with_region(draw_photo("wine", 0), of_background=True)
    assert ((other[3].int() + ground[3] - 255).abs() <= 1).all() and other[3].any()
    hole = (with_region(draw_photo("ring", 0), of_background=True)[3] > 127) & (photo[3] > 127)
    assert hole.sum() / (photo[3] > 127).sum() == pytest.approx(HOLE**2, abs=0.02)
    assert torch.equal(photo[:3], draw_photo("ring", 0))
    generator = torch.Generator().manual_seed(1)
    (view,) = cut_mix_views(photo, other, SIDE, 1, generator)
    half = SIDE // 2
    assert view.regions.shape == (2, SIDE, SIDE)
    assert not view.regions[0, :, half:].any() and not view.regions[1, :, :half].any()
    plain = make_views(draw_photo("ring", 0), SIDE, "flip", 1, generator)[1]
    flipped = make_views(photo, SIDE, "flip", 1, generator)[1]
    assert torch.equal(plain.image, flipped.image) and plain.regions is None
    resized = make_views(photo, SIDE, "resize", 30, generator)
    assert all(not each.regions[0][each.mask == 0].any() for each in resized)


def test_objects_weigh_more_in_the_loss() -> None:
    """Latents on an object weigh 3 times as much as others, and the mean over an image is 1."""
    objects = torch.zeros(1, 1, 4, 4)
    objects[..., :2, :] = 1.0
    weights = _latent_weights(torch.ones(1, 16, 16), 4, 1.0 + 2.0 * objects).float()
    assert torch.allclose(weights.unique(), torch.tensor([0.5, 1.5]))
    assert weights[0, 0, 0, 0] == 1.5 and weights.mean() == 1.0
