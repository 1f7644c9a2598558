"""Scenes of several circles, which fill50k never shows, drawn in its style.

Edges are hard, and outlines are 5 pixels wide in 512.
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from common.colour import CSS_COLOURS, NAMES, colour_difference, colour_name
from common.data.shapes import (
    CLEARLY_LEFT,
    NUMBER_WORDS,
    OUTLINE,
    VISIBLE,
    Scene,
    Shape,
    render_mask,
)
from common.errors import InputError
from common.files import atomic_write, check_same, make_folder
from common.images import write_png

LayoutKind = Literal["two", "two_shared", "three", "touching", "cut", "one_wide", "two_wide"]
KINDS: tuple[LayoutKind, ...] = get_args(LayoutKind)
STREAMS = {**{kind: k for k, kind in enumerate(KINDS)}, "canvas": 5, "one_wide": 6, "two_wide": 7}
"""Numbers in the seeds of the scenes, so that each kind has random numbers of its own."""
LAYOUT_SEED, LAYOUT_COUNT = 2025, 10
SIZE = 512
GAP = 0.04  # least gap between circles, and to the border, as a fraction of the side
NUMBERS = {word: number for number, word in NUMBER_WORDS.items()}
Disc = tuple[float, float, float]  # x, y, radius, as fractions of the side


def make_layouts(
    kind: LayoutKind, count: int = LAYOUT_COUNT, seed: int = LAYOUT_SEED
) -> tuple[Scene, ...]:
    """`count` scenes of one to three circles, from left to right.

    Their centres are at least CLEARLY_LEFT apart horizontally, so that a caption that names them in
    this order says which circle has which colour.

    - two: two colours
    - two_shared: the circles of "two", both in the first one's colour
    - three: three colours
    - touching: two circles in two colours whose edges meet in one point
    - cut: two circles, the second cut by the border, with its centre inside
    - one_wide, two_wide: one and two circles, small or large: radii of 0.09 to 0.27

    All colours of a scene, the background's included, differ by at least 10 in CIEDE2000 (VISIBLE).
    A scene depends only on the seed, its kind and its index.
    """
    scenes = []
    for index in range(count):
        drawn = "two" if kind == "two_shared" else kind
        scenes.append(draw_layout(kind, np.random.default_rng([seed, STREAMS[drawn], index])))
    return tuple(scenes)


def draw_layout(kind: LayoutKind, random: Generator) -> Scene:
    """A random scene of a layout, see `make_layouts`."""
    places = sorted(_draw_places("two" if kind == "two_shared" else kind, random))
    background, *colours = _draw_colours(len(places) + 1, random)
    if kind == "two_shared":
        colours = colours[:1] * len(places)
    shapes = [
        Shape("circle", colour, *place) for colour, place in zip(colours, places, strict=True)
    ]
    return Scene(background, tuple(shapes))


def make_canvas(circles: int, parts: int, seed: int = LAYOUT_SEED) -> Scene:
    """A scene for a canvas of `parts` x `parts` pictures: `circles` circles of one colour.

    Each circle is smaller than half a picture.
    """
    random = np.random.default_rng([seed, STREAMS["canvas"], circles, parts])
    places: list[Disc] = []
    while len(places) < circles:
        radius = random.uniform(0.2, 0.4) / parts
        place = (
            *random.uniform(radius + GAP / parts, 1.0 - radius - GAP / parts, size=2).tolist(),
            radius,
        )
        if all(
            math.dist(place[:2], other[:2]) > radius + other[2] + GAP / parts for other in places
        ):
            places.append(place)
    background, colour = _draw_colours(2, random)
    return Scene(background, tuple(Shape("circle", colour, *place) for place in sorted(places)))


def render_target(scene: Scene, size: int = SIZE) -> Tensor:
    """The target picture, uint8 [3, size, size], in exactly the scene's colours.

    It is not antialiased, as fill50k's targets.
    """
    picture = _colour(scene.background).expand(3, size, size).clone()
    for shape in scene.shapes:
        picture[:, render_mask(shape, size)] = _colour(shape.colour)[:, 0]
    return picture


def render_control(scene: Scene, size: int = SIZE, outline: float = OUTLINE) -> Tensor:
    """The control picture, uint8 [3, size, size]: white outlines on black, not antialiased.

    As in fill50k, the middle of the outline is where the target changes colour. `outline` is its
    thickness as a fraction of the side. Raises ValueError for shapes other than circles.
    """
    if any(shape.kind != "circle" for shape in scene.shapes):
        raise ValueError("only circles have a control picture of this kind")
    white = torch.zeros(size, size, dtype=torch.bool)
    for shape in scene.shapes:
        outer, inner = (
            render_mask(dataclasses.replace(shape, radius=shape.radius + half), size)
            for half in (outline / 2, -outline / 2)
        )
        white |= outer & ~inner
    return white.to(torch.uint8).mul(255).expand(3, size, size).contiguous()


# ----------------------------------------------------------------------------
# Captions.

Wording = Literal["each", "count", "single"]


class Description(NamedTuple):
    """What a prompt names: colours and number of the circles, and the background."""

    colours: tuple[str, ...]
    """Colours of the circles, in the prompt's order."""
    background: str
    """Colour of the background."""
    count: int | None = None
    """Number of circles, or None if the prompt does not state it."""


def caption(scene: Scene, wording: Wording = "each") -> str:
    """The prompt of a scene in fill50k's wording.

    - each: "red circle next to red circle with blue background", the scene's own caption
    - count: "two red circles with blue background"
    - single: "red circle with blue background", as in fill50k

    The last two are for scenes of one colour; they raise ValueError for several colours.
    """
    if wording == "each":
        return scene.caption
    if len({shape.colour for shape in scene.shapes}) != 1:
        raise ValueError(f"the wording {wording} is for scenes of one colour")
    single = f"{scene.shapes[0].colour} circle"
    what = single if wording == "single" else scene.counted or single
    return f"{what} with {scene.background} background"


def parse_caption(prompt: str) -> Description:
    """The inverse of `caption`, for colours in any of the spellings of `colour_name`.

    Raises InputError if the prompt has another form or a colour is no CSS colour.
    """
    objects, _, rest = " ".join(prompt.lower().split()).partition(" with ")
    parts = [
        re.fullmatch(r"(?:(two|three) )?(.+?) circle(s?)", part)
        for part in objects.split(" next to ")
    ]
    background = colour_name(rest.removesuffix(" background"))
    if rest.endswith(" background") and background and all(parts):
        numbers, words, plurals = zip(*(part.groups() for part in parts), strict=True)
        colours = [colour_name(word) for word in words]
        fits = all(
            (number is not None) == bool(plural)
            for number, plural in zip(numbers, plurals, strict=True)
        )
        if fits and None not in colours and (len(parts) == 1 or not any(numbers)):
            count = NUMBERS.get(numbers[0]) if len(parts) == 1 else len(parts)
            return Description(tuple(colours), background, count)
    raise InputError(
        f"the prompt {prompt!r} is not of the form COLOUR circle [next to COLOUR circle] with"
        " COLOUR background"
    )


# ----------------------------------------------------------------------------
# Files.


def write_layouts(folder: Path, scenes: Sequence[Scene], wording: Wording = "each") -> Path:
    """Writes the scenes in fill50k's layout; returns the path of prompt.json.

    The files are `folder/{source,target}/N.png` and `folder/prompt.json`. Raises InputError if
    there is another prompt.json already.
    """
    names = [
        {kind: f"{kind}/{index}.png" for kind in ("source", "target")}
        for index in range(len(scenes))
    ]
    lines = [
        json.dumps({**files, "prompt": caption(scene, wording)}) + "\n"
        for files, scene in zip(names, scenes, strict=True)
    ]
    prompts = "".join(lines).encode()
    check_same(folder / "prompt.json", prompts)
    for kind in ("source", "target"):
        make_folder(folder / kind)
    for files, scene in zip(names, scenes, strict=True):
        write_png(folder / files["source"], render_control(scene), staging=folder)
        write_png(folder / files["target"], render_target(scene), staging=folder)
    atomic_write(folder / "prompt.json", prompts)
    return folder / "prompt.json"


# ----------------------------------------------------------------------------
# Random places and colours.


def _draw_places(kind: LayoutKind, random: Generator) -> list[Disc]:
    """Random circles of a layout, redrawn until they fit the picture and keep their gaps."""
    count = {"three": 3, "one_wide": 1}.get(kind, 2)
    low, high = (0.09, 0.27) if kind.endswith("wide") else (0.12, 0.17 if count == 3 else 0.22)
    while True:
        radii = random.uniform(low, high, size=count).tolist()
        places = [(*random.uniform(r + GAP, 1.0 - r - GAP, size=2).tolist(), r) for r in radii]
        if kind == "touching":
            places[1] = _moved_to_touch(places[0], radii[1], random.uniform(0.0, 2.0 * math.pi))
        if kind == "cut":
            places[1] = _moved_to_border(
                places[1], int(random.integers(4)), random.uniform(0.1, 0.7)
            )
        # The gap of circles that touch is 0.
        gaps = [
            math.dist(a[:2], b[:2]) - a[2] - b[2] for i, a in enumerate(places) for b in places[:i]
        ]
        whole = all(
            r + GAP <= at <= 1.0 - r - GAP
            for *centre, r in places[: 1 if kind == "cut" else None]
            for at in centre
        )
        across = sorted(place[0] for place in places)
        in_order = all(b - a >= CLEARLY_LEFT for a, b in itertools.pairwise(across))
        if whole and in_order and (kind == "touching" or min(gaps, default=GAP) >= GAP):
            return places


def _moved_to_touch(first: Disc, radius: float, angle: float) -> Disc:
    """A circle of this radius that touches the first one in direction `angle`, in radians."""
    distance = first[2] + radius
    return first[0] + distance * math.cos(angle), first[1] + distance * math.sin(angle), radius


def _moved_to_border(place: Disc, border: int, depth: float) -> Disc:
    """`place` with its centre `depth` radii inside the left, upper, right or lower border."""
    x, y, radius = place
    at = depth * radius if border < 2 else 1.0 - depth * radius
    return (at, y, radius) if border % 2 == 0 else (x, at, radius)


def _draw_colours(count: int, random: Generator) -> list[str]:
    """`count` random CSS colour names that differ pairwise by at least VISIBLE."""
    taken: list[str] = []
    for index in random.permutation(len(NAMES)):
        name = NAMES[index]
        if all(
            colour_difference(CSS_COLOURS[name], CSS_COLOURS[other]) >= VISIBLE for other in taken
        ):
            taken.append(name)
        if len(taken) == count:
            break
    return taken


def _colour(name: str) -> Tensor:
    return torch.tensor(CSS_COLOURS[name], dtype=torch.uint8)[:, None, None]
