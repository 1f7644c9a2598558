"""Measures from pixels whether the drawn concepts are present, in place, swapped or blended.

An object counts as a ring if the background shows through a hole in it. It counts as angular, like
a triangle, if the area of its convex hull is below ANGULAR times that of the ellipse with the same
second moments (for an oval the two are equal). A colour counts as a concept's within NEAR
(CIEDE2000). Two concepts are requested in one image by three prompts, the keys of PAIRS:

- place, "a <new1> circle with <new2> background". In place: an object is wine, and the background
  mauve. Swapped: an object is mauve, and the background wine. Blended: an object or the background
  has a colour between the two.
- beside, "a <new3> next to a <new1> circle". In place: one object is angular and slate, the
  triangle's colour, and another is wine and not angular. Swapped: one is angular and wine, and
  another is slate and not angular. Blended: an object has a colour between the two, or is angular
  and wine.
- place_ring, "a <new4> with <new2> background". In place: an object is a ring, and the background
  mauve. Swapped: an object is mauve. Blended: an object or the background has a colour between
  mauve and gold, the colour of the rings in the photos.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage.color import deltaE_ciede2000
from skimage.measure import regionprops
from torch import Tensor

from common.colour import colour_difference, to_lab
from common.data.concepts import DRAWN, GOLD, MAUVE, SLATE, WINE
from common.images import resize
from common.metrics.segmentation import (
    NO_OBJECT_ERROR,
    SIZE,
    inner_region,
    median_colour,
    segment,
    separate,
)

NEAR = 10.0  # CIEDE2000 within which two colours count as equal
HOLLOW = 0.05  # least area of a hole, as a fraction of the filled object's
# Largest `_ellipticity` of an angular object. In images of the base model, 9 of 10 triangles beside
# a circle have 0.983 or less, and 9 of 10 circles 0.996 or more.
ANGULAR = 0.99
MIN_AREA = 0.01  # least area of an object, as a fraction of the image's
Colour = tuple[float, float, float]
"""RGB, each in 0..255."""


class Object(NamedTuple):
    """One object of an image."""

    colour: Colour | None
    """Its median colour; None if it is too thin to measure."""
    hole: bool
    """Whether the background shows through a hole in it."""
    angular: bool
    """Whether it is angular, like a triangle."""

    def is_near(self, colour: Colour) -> bool:
        """Whether its colour is within NEAR of `colour`."""
        return self.colour is not None and is_near(self.colour, colour)


class Seen(NamedTuple):
    """The objects and the background found in an image."""

    objects: list[Object]
    background: Colour | None
    """Its median colour; None if there is no background."""


class Judgement(NamedTuple):
    """How an image shows two requested concepts; the module's docstring defines each prompt's."""

    first: bool
    """The first concept is anywhere in the image."""
    second: bool
    """The second concept is anywhere in the image."""
    bound: bool
    """Each concept is in its place."""
    swapped: bool
    """Each concept is in the other's place."""
    blended: bool
    """Something is a mixture of both concepts."""


def look(picture: Tensor, colours: int) -> Seen:
    """Finds the objects, of up to `colours` colours, and the background of uint8 [3, S, S]."""
    labels = segment(picture, colours)
    large = resize(picture, SIZE, "nearest")
    side = picture.shape[-1]
    background = median_colour(large, inner_region(labels == 0, side))
    objects = [
        _describe(large, part, background, side)
        for label in range(1, colours + 1)
        for part in separate(labels == label, MIN_AREA)
    ]
    return Seen(objects, background)


def colour_error(name: str, seen: Seen) -> float:
    """CIEDE2000 between a drawn concept's colour and the colour found in its place.

    The place is the background for mauve, else the first object; NO_OBJECT_ERROR, 50, if the image
    shows nothing there.
    """
    if not seen.objects:
        return NO_OBJECT_ERROR
    found = seen.background if DRAWN[name].colour == MAUVE else seen.objects[0].colour
    return NO_OBJECT_ERROR if found is None else float(colour_difference(found, DRAWN[name].colour))


def is_present(name: str, seen: Seen) -> bool:
    """Whether the image shows the drawn concept: mauve as the background, others as an object."""
    if name == "mauve":
        return (
            bool(seen.objects) and seen.background is not None and is_near(seen.background, MAUVE)
        )
    return any(_is(name, each) for each in seen.objects)


def judge_place(seen: Seen) -> Judgement:
    """Judges an image of "place": wine as an object's colour, mauve as the background's."""
    objects, ground = _colours(seen)
    return Judgement(
        first=_shows(objects + ground, WINE),
        second=_shows(objects + ground, MAUVE),
        bound=_shows(objects, WINE) and _shows(ground, MAUVE),
        swapped=_shows(objects, MAUVE) and _shows(ground, WINE),
        blended=any(is_between(each, WINE, MAUVE) for each in objects + ground),
    )


def judge_beside(seen: Seen) -> Judgement:
    """Judges an image of "beside": a slate triangle and a wine circle as two objects."""
    triangle = any(_is("slate_triangle", each) for each in seen.objects)
    triangle_in_wine = any(each.angular and each.is_near(WINE) for each in seen.objects)
    circle = any(not each.angular and each.is_near(WINE) for each in seen.objects)
    circle_in_slate = any(not each.angular and each.is_near(SLATE) for each in seen.objects)
    return Judgement(
        first=triangle,
        second=circle,
        bound=triangle and circle,
        swapped=triangle_in_wine and circle_in_slate,
        blended=triangle_in_wine
        or any(is_between(each, SLATE, WINE) for each in _colours(seen)[0]),
    )


def judge_place_ring(seen: Seen) -> Judgement:
    """Judges an image of "place_ring": a ring as an object, mauve as the background's colour."""
    objects, ground = _colours(seen)
    ring = any(_is("ring", each) for each in seen.objects)
    return Judgement(
        first=ring,
        second=_shows(objects + ground, MAUVE),
        bound=ring and _shows(ground, MAUVE),
        swapped=_shows(objects, MAUVE),
        blended=any(is_between(each, GOLD, MAUVE) for each in objects + ground),
    )


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two concepts that are requested in one image."""

    names: tuple[str, str]
    """Their keys in DRAWN."""
    prompt: str
    """The prompt, with {} and {} in the places of the two placeholders."""
    colours: int
    """Number of object colours to look for."""
    judge: Callable[[Seen], Judgement]


PAIRS = {
    "place": Pair(("wine", "mauve"), "a {} circle with {} background", 1, judge_place),
    "beside": Pair(("slate_triangle", "wine"), "a {} next to a {} circle", 2, judge_beside),
    "place_ring": Pair(("ring", "mauve"), "a {} with {} background", 1, judge_place_ring),
}


# ----------------------------------------------------------------------------
# Colours and shapes.


def is_near(colour: Colour, other: Colour) -> bool:
    """Whether two colours, RGB in 0..255, differ by at most NEAR (CIEDE2000)."""
    return float(colour_difference(colour, other)) <= NEAR


def is_between(colour: Colour, one: Colour, other: Colour) -> bool:
    """Whether a colour is a mixture of two others, all RGB in 0..255.

    It must lie within NEAR of the line between them in CIELAB, in the middle half of the line.
    """
    at, start, end = (to_lab(rgb) for rgb in (colour, one, other))
    along = float((at - start) @ (end - start) / ((end - start) @ (end - start)))
    return (
        0.25 <= along <= 0.75 and float(deltaE_ciede2000(at, start + along * (end - start))) <= NEAR
    )


def _colours(seen: Seen) -> tuple[list[Colour], list[Colour]]:
    """Colours of the objects, and of the background, which counts only if there is an object."""
    objects = [each.colour for each in seen.objects if each.colour is not None]
    return objects, [seen.background] if seen.background is not None and seen.objects else []


def _shows(colours: Sequence[Colour], colour: Colour) -> bool:
    return any(is_near(each, colour) for each in colours)


def _is(name: str, each: Object) -> bool:
    """Whether an object shows the drawn concept `name`."""
    if name == "ring":
        return each.hole
    if name == "slate_triangle":
        return each.angular and not each.hole and each.is_near(SLATE)
    return each.is_near(DRAWN[name].colour)


def _describe(picture: Tensor, part: Tensor, background: Colour | None, side: int) -> Object:
    """Measures the object with the mask `part`, bool [SIZE, SIZE]; `side` is the model's own."""
    filled = ndimage.binary_fill_holes(part.numpy())
    area, gap = int(filled.sum()), torch.from_numpy(filled) & ~part
    # A gap that another object fills is not a hole, so its colour must be the background's.
    shown = (
        median_colour(picture, inner_region(gap, side)) if int(gap.sum()) > HOLLOW * area else None
    )
    hole = shown is not None and background is not None and is_near(shown, background)
    return Object(
        median_colour(picture, inner_region(part, side)), hole, _ellipticity(filled) < ANGULAR
    )


def _ellipticity(mask: NDArray[np.bool_]) -> float:
    """Area of a mask's convex hull divided by that of the ellipse with the same second moments.

    1 for every ellipse, 0.95 for a parallelogram, 0.83 for a triangle. An affine invariant (Rosin
    2003, "Measuring shape: ellipticity, rectangularity, and triangularity").
    """
    (shape,) = regionprops(mask.astype(np.uint8))
    (hull,) = regionprops(shape.image_convex.astype(np.uint8))
    return float(hull.area / (np.pi / 4.0 * hull.axis_major_length * hull.axis_minor_length))


def rates(judgements: Sequence[Judgement]) -> dict[str, float]:
    """Fraction of the images for which each field of `Judgement` is true."""
    values = torch.tensor(judgements, dtype=torch.float64).mean(0).tolist()
    return dict(zip(Judgement._fields, values, strict=True))
