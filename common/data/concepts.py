"""Photos of concepts for personalisation: read from a folder, or drawn.

A concept's folder holds a few photos of it and nothing else, as in the homework's
`textual_inversion/{0,1,cat}/*.jpg`. The small model's vocabulary has no name for the drawn
concepts: colours that are far from every CSS colour, a shape in such a colour, and a shape in any
colour that `common.data.shapes` does not have.
"""

import dataclasses
from collections.abc import Callable, Sequence
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
"""Radius of a ring's hole, as a fraction of the ring's radius."""
PHOTOS, SIDE, FINER = 5, 128, 4
OTHERS = (
    *("white", "pink", "light green", "sky blue", "violet"),
    *("black", "silver", "aquamarine", "olive", "royal blue"),
)
"""Colours of the rest of a photo, in turn. Captions name them, so that they are not learned as part
of the concept, and they differ, so that the concept is not learned for one of them only (a ring
learned on white had no hole on any other background)."""
RING_COLOURS = (
    *("gold", "teal", "crimson", "purple", "green"),
    *("orange", "indigo", "saddle brown", "blue", "yellow"),
)
"""Colours of the rings in photos, in turn. Captions name them too, so that the word means the shape
alone."""
Rgb = tuple[int, int, int]
"""A colour, each channel in 0..255."""


# ----------------------------------------------------------------------------
# Reading.


def read_photos(folder: Path) -> list[Tensor]:
    """The photos of a concept, uint8 [3, H, W], in the order of file names.

    They are rotated to upright by their EXIF orientation. Raises InputError if there is none, or if
    one cannot be read.
    """
    files = image_files(folder, report=True)
    if not files:
        what = "is a file" if Path(folder).is_file() else "holds no photo"
        raise InputError(f"the concept folder {folder} {what}: a folder of pictures is expected")
    return [read_photo(file) for file in files]


# ----------------------------------------------------------------------------
# Drawing.


@dataclasses.dataclass(frozen=True)
class DrawnConcept:
    """A concept whose photos are drawn."""

    draw: Callable[[Generator, int, Rgb, Rgb], Tensor]
    """(random, side, own colour, other colour) -> a photo, uint8 [3, side, side]."""
    phrase: str
    """The concept in a sentence; {} stands for its name."""
    setting: str
    """Caption of a photo, with {phrase} and {other}, the other colour's name."""
    word: str
    """The known word closest in meaning."""
    colour: Rgb | None = None
    """Its colour, if that is a part of the concept."""
    colours: tuple[str, ...] = ()
    """The names of its colours in the photos, in turn, if its colour is no part of the concept."""
    is_thing: bool = True
    """Whether it can be placed beside another concept; a background cannot."""

    def phrase_in(self, index: int) -> str:
        """The concept in photo `index`, with its colour if that has a name: "{}", "gold {}"."""
        return f"{_in_turn(self.colours, index)} {self.phrase}" if self.colours else self.phrase

    def caption(self, index: int) -> str:
        """The caption of photo `index`; {} stands for the concept's name."""
        return self._in_setting(self.phrase_in(index), index)

    def captions(self, index: int) -> tuple[str, ...]:
        """All captions of photo `index`: with the colours that have a name, with less, with none.

        So the concept is also learned where its own colour or the other one is not named.
        """
        phrases = (self.phrase_in(index), self.phrase)
        settings = tuple(self._in_setting(phrase, index) for phrase in phrases)
        return tuple(dict.fromkeys(settings + phrases))

    def _in_setting(self, phrase: str, index: int) -> str:
        return self.setting.format(phrase=phrase, other=_in_turn(OTHERS, index))


def draw_photo(name: str, index: int, seed: int = 0, side: int = SIDE) -> Tensor:
    """Photo `index` of a drawn concept, uint8 [3, side, side], antialiased.

    It depends on the arguments only.
    """
    random = np.random.default_rng(derive_seed(seed, sorted(DRAWN).index(name), index))
    drawn = DRAWN[name]
    own = drawn.colour or CSS_COLOURS[_in_turn(drawn.colours, index)]
    return drawn.draw(random, side, own, CSS_COLOURS[_in_turn(OTHERS, index)])


def _in_turn(names: Sequence[str], index: int) -> str:
    return names[index % len(names)]


def _draw_shape(kind: str) -> Callable[[Generator, int, Rgb, Rgb], Tensor]:
    return lambda random, side, own, other: _paint(_mask(_place(random, kind), side), own, other)


def _draw_background(random: Generator, side: int, own: Rgb, other: Rgb) -> Tensor:
    return _paint(_mask(_place(random, "circle"), side), other, own)


def _draw_ring(random: Generator, side: int, own: Rgb, other: Rgb) -> Tensor:
    """A circle with a hole."""
    disc = _place(random, "circle")
    hole = dataclasses.replace(disc, radius=HOLE * disc.radius)
    return _paint(_mask(disc, side) - _mask(hole, side), own, other)


def _place(random: Generator, kind: str) -> Shape:
    """A whole, large shape at a random place; its colour is left empty.

    Half as large, beside another one, it still has the size of a shape in a pair.
    """
    radius = random.uniform(0.34, 0.42)
    x, y = random.uniform(radius + 0.03, 1.0 - radius - 0.03, size=2).tolist()
    return Shape(kind, "", x, y, float(radius), float(random.uniform(-0.4, 0.4)))


def _mask(shape: Shape, side: int) -> Tensor:
    """The fraction of each pixel that a shape covers, [side, side] in [0, 1]."""
    return render_mask(shape, FINER * side).float().view(side, FINER, side, FINER).mean((1, 3))


def _paint(mask: Tensor, colour: Rgb, background: Rgb) -> Tensor:
    """uint8 [3, side, side]: `colour` where the mask is 1, `background` where it is 0."""
    inside, outside = (
        torch.tensor(rgb, dtype=torch.float32).view(3, 1, 1) for rgb in (colour, background)
    )
    return (mask * inside + (1.0 - mask) * outside).round().to(torch.uint8)


_ON_GROUND, _ROUND_CIRCLE = "{phrase} with {other} background", "{other} {phrase}"
DRAWN: dict[str, DrawnConcept] = {
    "wine": DrawnConcept(_draw_shape("circle"), "{} circle", _ON_GROUND, "maroon", WINE),
    "mauve": DrawnConcept(
        _draw_background,
        "circle with {} background",
        _ROUND_CIRCLE,
        "gray",
        MAUVE,
        is_thing=False,
    ),
    "slate_triangle": DrawnConcept(_draw_shape("triangle"), "{}", _ON_GROUND, "triangle", SLATE),
    "ring": DrawnConcept(_draw_ring, "{}", _ON_GROUND, "circle", colours=RING_COLOURS),
}
"""Drawn concepts by name: a colour of circles, a colour of backgrounds, a triangle in a colour of
its own, and a ring in any colour."""
