"""Pictures of coloured shapes on coloured backgrounds with captions, drawn on the fly in the manner
of fill50k."""

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
SUPERSAMPLING = 4
OUTLINE = 5 / 512  # fill50k draws outlines of 5 pixels in 512
HELD_OUT_SEED, HELD_OUT_COUNT, HELD_OUT_DISTANCE = 2024, 50, 5.0
VISIBLE = 10.0
CLEARLY_LEFT = 0.1  # of one centre from the next, as a part of the side
_CORNERS = {"square": 4, "triangle": 3, "star": 10}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One shape; centre and radius (of the circle around it) are parts of the picture's side, the
    angle is in radians."""

    kind: str
    colour: str
    x: float
    y: float
    radius: float
    angle: float = 0.0


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a picture shows; later shapes lie above earlier ones."""

    background: str
    shapes: tuple[Shape, ...]

    @property
    def objects(self) -> str:
        """The shapes in words: "red circle", "red circle next to lime star"."""
        return " next to ".join(f"{shape.colour} {shape.kind}" for shape in self.shapes)

    @property
    def caption(self) -> str:
        """fill50k's wording: "red circle with blue background", "red circle next to lime star with
        blue background"."""
        return f"{self.objects} with {self.background} background"


@functools.cache
def held_out_classes(
    count: int = HELD_OUT_COUNT, seed: int = HELD_OUT_SEED, distance: float = HELD_OUT_DISTANCE
) -> tuple[tuple[str, str], ...]:
    """The (colour, kind) classes of the compositional test, which no training may show.

    They are shared out evenly among the kinds that are not circles (fill50k shows circles of every
    colour); the colours come in an order shuffled by the seed, and one is taken if it is at least
    `distance` (CIEDE2000) from those taken for its kind.
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
        raise ValueError(f"{count} classes at a distance of {distance} cannot be had")
    return tuple(classes)


def held_out_scene(index: int, random: Generator) -> Scene:
    """A picture for held-out class `index`: one whole shape on a background that differs visibly
    (CIEDE2000)."""
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
    left_to_right: bool = False,
) -> Scene:
    """A scene of `count` shapes that do not touch, all colours different, no (colour, kind) pair of
    `forbidden`.

    With `cut_off` a single shape may cross the border, like half of fill50k's circles. `first`
    fixes the (colour, kind) of the first shape, `smallest` is the least radius, and with
    `left_to_right` the shapes come in that order, clearly so.
    """
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
            radius = random.uniform(smallest, 0.4 if count == 1 else 0.24)
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
    """A circle like fill50k's, in two different colours: the centre 0.2 to 0.8 and the radius 0.1
    to 0.5 of the side, evenly.

    Those of the 100 testing pairs are 0.20 to 0.80 and 0.13 to 0.50; half of them touch the border.
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
    """Where the shape is (if nothing covers it), bool [size, size]."""
    side = size * SUPERSAMPLING
    image = Image.new("L", (side, side), 0)
    _paint(ImageDraw.Draw(image), shape, side, fill=255)
    return torch.from_numpy(np.array(image.reduce(SUPERSAMPLING))) > 127


def _paint(pen: ImageDraw.ImageDraw, shape: Shape, side: int, **style: object) -> None:
    x, y, radius = shape.x * side, shape.y * side, shape.radius * side
    if shape.kind == "circle":
        pen.ellipse(
            (x - radius, y - radius, x + radius - 1, y + radius - 1), **style
        )  # Pillow includes the last pixel
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
