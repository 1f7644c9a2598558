"""What a picture shows of the drawn concepts, from its pixels: whether each is there, in its place,
swapped or blended.

A shape counts as a ring if the background shows through a hole in it, and as angular, as a triangle
is, if its convex hull has less area than the ellipse with the same second moments (an oval has as
much); a colour counts as a concept's within NEAR (CIEDE2000). Two concepts are asked for in one of
three ways:

- PLACE, "a <new1> circle with <new2> background": wine is a colour of the circle, mauve one of the
  background. Blended: the circle or the background has a colour between the two.
- BESIDE, "a <new3> next to a <new1> circle": one object is angular and slate, the triangle's
  colour, another is wine and not angular. Blended: one object has a colour between the two, or is
  angular and wine.
- PLACE_RING, "a <new4> with <new2> background": one object is a ring, and mauve a colour of the
  background. Swapped: an object is mauve. Blended: the ring or the background has a colour between
  gold, that of the photos' rings, and mauve.
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

NEAR = 10.0
HOLLOW = 0.05  # of an object's area
# Of the base's own pictures, 9 in 10 triangles beside a circle have 0.983 or less, 9 in 10 circles
# 0.996 or more.
ANGULAR = 0.99
MIN_AREA = 0.01  # of the picture
Colour = tuple[float, float, float]


class Object(NamedTuple):
    """One shape of a picture."""

    colour: Colour | None
    hole: bool
    angular: bool

    def is_near(self, colour: Colour) -> bool:
        """Whether it has that colour."""
        return self.colour is not None and is_near(self.colour, colour)


class Seen(NamedTuple):
    """What a picture shows."""

    objects: list[Object]
    background: Colour | None


class Judgement(NamedTuple):
    """Of two concepts in one picture."""

    first: bool
    """The first is somewhere."""
    second: bool
    """The second is somewhere."""
    bound: bool
    """Each is in its place."""
    swapped: bool
    """Each is in the other's."""
    blended: bool
    """Something is a mixture of both."""


def look(picture: Tensor, colours: int) -> Seen:
    """The objects, of up to `colours` colours, and the background of a picture, uint8 [3, S, S]."""
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
    """CIEDE2000 between a drawn concept's colour and that of its place in a picture, 50 where
    nothing is to be seen there."""
    if not seen.objects:
        return NO_OBJECT_ERROR
    found = seen.background if DRAWN[name].colour == MAUVE else seen.objects[0].colour
    return NO_OBJECT_ERROR if found is None else float(colour_difference(found, DRAWN[name].colour))


def is_present(name: str, seen: Seen) -> bool:
    """Whether a picture shows the drawn concept in its own place."""
    if name == "mauve":
        return (
            bool(seen.objects) and seen.background is not None and is_near(seen.background, MAUVE)
        )
    return any(_is(name, each) for each in seen.objects)


def judge_place(seen: Seen) -> Judgement:
    """Of wine and mauve, as object and background."""
    objects, ground = _colours(seen)
    return Judgement(
        first=_shows(objects + ground, WINE),
        second=_shows(objects + ground, MAUVE),
        bound=_shows(objects, WINE) and _shows(ground, MAUVE),
        swapped=_shows(objects, MAUVE) and _shows(ground, WINE),
        blended=any(is_between(each, WINE, MAUVE) for each in objects + ground),
    )


def judge_beside(seen: Seen) -> Judgement:
    """Of the triangle and a wine circle, as two objects."""
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
    """Of the ring and mauve, as object and background."""
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
    """Two concepts that are asked for in one picture."""

    names: tuple[str, str]
    prompt: str
    """With the two concepts' placeholders as {} and {}."""
    colours: int
    """Colours of objects."""
    judge: Callable[[Seen], Judgement]


PAIRS = {
    "place": Pair(("wine", "mauve"), "a {} circle with {} background", 1, judge_place),
    "beside": Pair(("slate_triangle", "wine"), "a {} next to a {} circle", 2, judge_beside),
    "place_ring": Pair(("ring", "mauve"), "a {} with {} background", 1, judge_place_ring),
}


# ----------------------------------------------------------------------------
# Parts.


def is_near(colour: Colour, other: Colour) -> bool:
    """Whether two colours in 0..255 count as one."""
    return float(colour_difference(colour, other)) <= NEAR


def is_between(colour: Colour, one: Colour, other: Colour) -> bool:
    """Whether a colour is a mixture of two: near the line between them in CIELAB, in its middle
    half."""
    at, start, end = (to_lab(rgb) for rgb in (colour, one, other))
    along = float((at - start) @ (end - start) / ((end - start) @ (end - start)))
    return (
        0.25 <= along <= 0.75 and float(deltaE_ciede2000(at, start + along * (end - start))) <= NEAR
    )


def _colours(seen: Seen) -> tuple[list[Colour], list[Colour]]:
    """Those of the objects, and that of the background, which counts only behind an object."""
    objects = [each.colour for each in seen.objects if each.colour is not None]
    return objects, [seen.background] if seen.background is not None and seen.objects else []


def _shows(colours: Sequence[Colour], colour: Colour) -> bool:
    return any(is_near(each, colour) for each in colours)


def _is(name: str, each: Object) -> bool:
    if name == "ring":
        return each.hole
    if name == "slate_triangle":
        return each.angular and not each.hole and each.is_near(SLATE)
    return each.is_near(DRAWN[name].colour)


def _describe(picture: Tensor, part: Tensor, background: Colour | None, side: int) -> Object:
    filled = ndimage.binary_fill_holes(part.numpy())
    area, gap = int(filled.sum()), torch.from_numpy(filled) & ~part
    # What another object fills is no hole.
    shown = (
        median_colour(picture, inner_region(gap, side)) if int(gap.sum()) > HOLLOW * area else None
    )
    hole = shown is not None and background is not None and is_near(shown, background)
    return Object(
        median_colour(picture, inner_region(part, side)), hole, _ellipticity(filled) < ANGULAR
    )


def _ellipticity(mask: NDArray[np.bool_]) -> float:
    """The area of a mask's convex hull over that of the ellipse with the same second moments: 1 for
    every ellipse, 0.95 for a parallelogram, 0.83 for a triangle. An affine invariant (Rosin 2003,
    "Measuring shape: ellipticity, rectangularity, and triangularity")."""
    (shape,) = regionprops(mask.astype(np.uint8))
    (hull,) = regionprops(shape.image_convex.astype(np.uint8))
    return float(hull.area / (np.pi / 4.0 * hull.axis_major_length * hull.axis_minor_length))


def rates(judgements: Sequence[Judgement]) -> dict[str, float]:
    """How often each thing is so."""
    values = torch.tensor(judgements, dtype=torch.float64).mean(0).tolist()
    return dict(zip(Judgement._fields, values, strict=True))
