"""Photos of concepts: read from a folder, and drawn ones that have no name in the small model's
vocabulary.

A concept's folder holds a few photos of it and nothing else, as in the homework's
`textual_inversion/{0,1,cat}/*.jpg`. The drawn concepts are colours that are far from every CSS
colour, a shape in such a colour, and a shape that `common.data.shapes` has not.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from common.colour import CSS_COLOURS
from common.data.shapes import Shape, render_mask
from common.errors import InputError
from common.images import image_files, read_photo
from common.seeds import derive_seed

WINE, MAUVE, SLATE = (60, 0, 24), (120, 84, 108), (24, 84, 120)
GOLD = CSS_COLOURS["gold"]
HOLE = 0.55
"""Radius of a ring's hole, as a part of the ring's."""
PHOTOS, SIDE, FINER = 5, 128, 4
OTHERS = ("white", "pink", "light green", "sky blue", "violet")
"""Colours of what a photo shows beside its concept, in turn. Captions name them, so that they are
no part of what is learned, and they differ, so that nothing is learned for one of them alone (a
ring learned on white had no hole on any other background)."""
Rgb = tuple[int, int, int]


# ----------------------------------------------------------------------------
# Reading.


def read_photos(folder: Path) -> list[Tensor]:
    """The photos of a concept, uint8 [3, H, W] in the order of their names, turned upright as their
    EXIF entry says.

    Raises InputError if there is none, or one that cannot be read.
    """
    files = image_files(folder)
    if not files:
        raise InputError(
            f"the concept folder {folder} holds no photo: .jpg or .png files are expected"
        )
    return [read_photo(file) for file in files]


# ----------------------------------------------------------------------------
# Drawing.


@dataclasses.dataclass(frozen=True)
class DrawnConcept:
    """A concept whose photos are drawn, and what is known about it."""

    draw: Callable[[Generator, int, Rgb], Tensor]
    """(random, side, other colour) -> a photo, uint8 [3, side, side]."""
    phrase: str
    """How it stands in a sentence; {} stands for the concept."""
    setting: str
    """What a photo shows, in words: {phrase} and the {other} colour."""
    word: str
    """A known word that comes near."""
    colour: Rgb | None = None
    """Its colour, if that is a part of it."""
    is_thing: bool = True
    """Whether it can stand beside another; a background cannot."""

    def caption(self, index: int) -> str:
        """What photo `index` shows, in words; {} stands for the concept."""
        return self.setting.format(phrase=self.phrase, other=OTHERS[index % len(OTHERS)])


def draw_photo(name: str, index: int, seed: int = 0, side: int = SIDE) -> Tensor:
    """Photo `index` of a drawn concept, uint8 [3, side, side], antialiased; it depends on the
    arguments alone."""
    random = np.random.default_rng(derive_seed(seed, sorted(DRAWN).index(name), index))
    return DRAWN[name].draw(random, side, CSS_COLOURS[OTHERS[index % len(OTHERS)]])


def _shape_of(kind: str, colour: Rgb) -> Callable[[Generator, int, Rgb], Tensor]:
    return lambda random, side, other: _paint(_mask(_place(random, kind), side), colour, other)


def _background_of(colour: Rgb) -> Callable[[Generator, int, Rgb], Tensor]:
    return lambda random, side, other: _paint(_mask(_place(random, "circle"), side), other, colour)


def _ring_of(colour: Rgb) -> Callable[[Generator, int, Rgb], Tensor]:
    """A circle with a hole."""

    def draw(random: Generator, side: int, other: Rgb) -> Tensor:
        disc = _place(random, "circle")
        ring = _mask(disc, side) - _mask(dataclasses.replace(disc, radius=HOLE * disc.radius), side)
        return _paint(ring, colour, other)

    return draw


def _place(random: Generator, kind: str) -> Shape:
    """A whole shape, large, as what a photo is of: at half size beside another it is still as large
    as a pair's. Its colour says nothing here."""
    radius = random.uniform(0.34, 0.42)
    x, y = random.uniform(radius + 0.03, 1.0 - radius - 0.03, size=2).tolist()
    return Shape(kind, "", x, y, float(radius), float(random.uniform(-0.4, 0.4)))


def _mask(shape: Shape, side: int) -> Tensor:
    """How much of each pixel a shape covers, [side, side] in [0, 1]."""
    return render_mask(shape, FINER * side).float().view(side, FINER, side, FINER).mean((1, 3))


def _paint(mask: Tensor, colour: Rgb, background: Rgb) -> Tensor:
    """uint8 [3, side, side]."""
    inside, outside = (
        torch.tensor(rgb, dtype=torch.float32).view(3, 1, 1) for rgb in (colour, background)
    )
    return (mask * inside + (1.0 - mask) * outside).round().to(torch.uint8)


_ON_GROUND, _ROUND_CIRCLE = "{phrase} with {other} background", "{other} {phrase}"
DRAWN: dict[str, DrawnConcept] = {
    "wine": DrawnConcept(_shape_of("circle", WINE), "{} circle", _ON_GROUND, "maroon", WINE),
    "mauve": DrawnConcept(
        _background_of(MAUVE),
        "circle with {} background",
        _ROUND_CIRCLE,
        "gray",
        MAUVE,
        is_thing=False,
    ),
    "slate_triangle": DrawnConcept(
        _shape_of("triangle", SLATE), "{}", _ON_GROUND, "triangle", SLATE
    ),
    "ring": DrawnConcept(_ring_of(GOLD), "{}", _ON_GROUND, "circle"),
}
"""A colour (of circles), a second one (of backgrounds), a shape and colour pair, and a golden
ring."""
