"""Random scenes of coloured shapes with captions in the style of fill50k, and their pictures."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Collection

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image, ImageDraw
from torch import Tensor

from common.colour import CSS_COLOURS, NAMES, colour_difference

KINDS = ("circle", "square", "triangle", "star")
NUMBER_WORDS = {2: "two", 3: "three"}
SUPERSAMPLING = 4
OUTLINE = 5 / 512  # fill50k draws outlines of 5 pixels in 512
HELD_OUT_SEED, HELD_OUT_COUNT, HELD_OUT_DISTANCE = 2024, 50, 5.0
VISIBLE = 10.0  # CIEDE2000
CLEARLY_LEFT = 0.1  # least horizontal distance of two centres, as a fraction of the side
_CORNERS = {"square": 4, "triangle": 3, "star": 10}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One shape."""

    kind: str
    """One of KINDS."""
    colour: str
    """CSS colour name."""
    x: float
    """Centre from the left, as a fraction of the picture's side."""
    y: float
    """Centre from the top, as a fraction of the picture's side."""
    radius: float
    """Radius of the circumscribed circle, as a fraction of the picture's side."""
    angle: float = 0.0
    """Rotation in radians."""


@dataclasses.dataclass(frozen=True)
class Scene:
    """The content of a picture; later shapes cover earlier ones."""

    background: str
    shapes: tuple[Shape, ...]

    @property
    def objects(self) -> str:
        """The shapes in words: "red circle", "red circle next to lime star"."""
        return " next to ".join(f"{shape.colour} {shape.kind}" for shape in self.shapes)

    @property
    def counted(self) -> str | None:
        """Two or three shapes of one kind and one colour in words: "two red circles"; else None."""
        if len({(shape.colour, shape.kind) for shape in self.shapes}) != 1:
            return None
        number, shape = NUMBER_WORDS.get(len(self.shapes)), self.shapes[0]
        return number and f"{number} {shape.colour} {shape.kind}s"

    @property
    def caption(self) -> str:
        """The caption in fill50k's wording: "red circle with blue background".

        With two shapes it is "red circle next to lime star with blue background".
        """
        return f"{self.objects} with {self.background} background"


@functools.cache
def held_out_classes(
    count: int = HELD_OUT_COUNT, seed: int = HELD_OUT_SEED, distance: float = HELD_OUT_DISTANCE
) -> tuple[tuple[str, str], ...]:
    """The (colour, kind) classes of the compositional test, which no training may show.

    They are divided evenly among the kinds other than circles (fill50k shows circles of every
    colour). For each kind, colours are tried in an order shuffled by `seed`; one is taken if its
    CIEDE2000 distance from those already taken for the kind is at least `distance`. Raises
    ValueError if there are fewer than `count` such classes.
    """
    kinds = [kind for kind in KINDS if kind != "circle"]
    random = np.random.default_rng(seed)
    classes = []
    for i, kind in enumerate(kinds):
        taken: list[str] = []
        for colour in random.permutation(len(NAMES)):
            if len(taken) == count // len(kinds) + (i < count % len(kinds)):
                break
            name = NAMES[colour]
            if all(
                colour_difference(CSS_COLOURS[name], CSS_COLOURS[other]) >= distance
                for other in taken
            ):
                taken.append(name)
        classes += [(name, kind) for name in taken]
    if len(classes) < count:
        raise ValueError(f"there are fewer than {count} classes at a CIEDE2000 of {distance}")
    return tuple(classes)


def held_out_scene(index: int, random: Generator) -> Scene:
    """A scene for held-out class `index`: one whole shape on a visibly different background.

    Visibly different means at least VISIBLE in CIEDE2000.
    """
    first = held_out_classes()[index]
    while True:
        scene = draw_scene(random, first=first, cut_off=False)
        if colour_difference(CSS_COLOURS[scene.background], CSS_COLOURS[first[0]]) >= VISIBLE:
            return scene


def draw_scene(
    random: Generator,
    *,
    count: int = 1,
    kinds: Collection[str] = KINDS,
    forbidden: Collection[tuple[str, str]] = (),
    cut_off: bool = True,
    first: tuple[str, str] | None = None,
    smallest: float = 0.1,
    largest: float | None = None,
    left_to_right: bool = False,
) -> Scene:
    """A random scene of `count` shapes that do not touch; shapes and background differ in colour.

    No shape has a (colour, kind) of `forbidden`. With `cut_off` a single shape may cross the
    border, like half of fill50k's circles. `first` fixes the (colour, kind) of the first shape.
    Radii are `smallest` to `largest`, as fractions of the side; by default up to 0.4 for one shape
    and 0.24 for several. With `left_to_right` the shapes are
    ordered by their centres, which are at least CLEARLY_LEFT apart horizontally.
    """
    largest = largest or (0.4 if count == 1 else 0.24)
    while True:
        colours = random.choice(NAMES, size=count + 1, replace=False).tolist()
        names = random.choice(sorted(kinds), size=count).tolist()
        if first:
            if first[0] in colours:
                colours.remove(first[0])
            colours = [colours[0], first[0], *colours[1:]][: count + 1]
            names = [first[1], *names[1:]]
        if any(pair in forbidden for pair in zip(colours[1:], names, strict=True)):
            continue
        places = []
        for _ in range(count):
            radius = random.uniform(smallest, largest)
            margin = 0.25 if cut_off and count == 1 else min(radius + 0.02, 0.5)
            places.append((*random.uniform(margin, 1.0 - margin, size=2), radius))
        if left_to_right:
            places.sort()
            if any(b[0] - a[0] < CLEARLY_LEFT for a, b in itertools.pairwise(places)):
                continue
        if all(
            math.dist(a[:2], b[:2]) > a[2] + b[2] + 0.03
            for i, a in enumerate(places)
            for b in places[:i]
        ):
            break
    shapes = [
        Shape(kind, colour, float(x), float(y), float(radius), float(random.uniform(-0.4, 0.4)))
        for kind, colour, (x, y, radius) in zip(names, colours[1:], places, strict=True)
    ]
    return Scene(colours[0], tuple(shapes))


def draw_circle(random: Generator) -> Scene:
    """A scene of one circle like fill50k's, in two different colours.

    The centre is uniform in 0.2 to 0.8 and the radius in 0.1 to 0.5 of the side. In the 100 testing
    pairs of fill50k they are 0.20 to 0.80 and 0.13 to 0.50, and half of the circles touch the
    border.
    """
    background, colour = random.choice(NAMES, size=2, replace=False).tolist()
    x, y = random.uniform(0.2, 0.8, size=2).tolist()
    return Scene(background, (Shape("circle", colour, x, y, float(random.uniform(0.1, 0.5))),))


def render(scene: Scene, size: int) -> Tensor:
    """The picture, uint8 [3, size, size], with antialiased edges."""
    side = size * SUPERSAMPLING
    image = Image.new("RGB", (side, side), CSS_COLOURS[scene.background])
    for shape in scene.shapes:
        _paint(ImageDraw.Draw(image), shape, side, fill=CSS_COLOURS[shape.colour])
    return _to_tensor(image.reduce(SUPERSAMPLING))


def render_mask(shape: Shape, size: int) -> Tensor:
    """The pixels of the shape, bool [size, size], as if nothing covered it."""
    return render_coverage(shape, size) > 127


def render_coverage(shape: Shape, size: int) -> Tensor:
    """How much of each pixel the shape covers, uint8 [size, size]: 0 for nothing, 255 for all."""
    side = size * SUPERSAMPLING
    image = Image.new("L", (side, side), 0)
    _paint(ImageDraw.Draw(image), shape, side, fill=255)
    return torch.from_numpy(np.array(image.reduce(SUPERSAMPLING)))


def _paint(pen: ImageDraw.ImageDraw, shape: Shape, side: int, **style: object) -> None:
    x, y, radius = shape.x * side, shape.y * side, shape.radius * side
    if shape.kind == "circle":
        # Pillow includes the last pixel.
        pen.ellipse((x - radius, y - radius, x + radius - 1, y + radius - 1), **style)
        return
    corners = _CORNERS[shape.kind]
    points = []
    for i in range(corners):
        angle = (
            shape.angle
            + 2.0 * math.pi * i / corners
            - math.pi / 2
            - (math.pi / 4 if shape.kind == "square" else 0.0)
        )
        length = radius * (0.42 if shape.kind == "star" and i % 2 else 1.0)
        points.append((x + length * math.cos(angle), y + length * math.sin(angle)))
    pen.polygon(points, **style)


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
