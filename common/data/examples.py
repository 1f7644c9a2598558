"""Pictures with captions and control images at a small size: drawn scenes and fill50k's pairs."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.colour import NAMES
from common.data.fill50k import Part, load_fill50k
from common.data.layouts import draw_layout, render_control
from common.data.shapes import KINDS, NUMBER_WORDS, Scene, draw_circle, draw_scene, render
from common.images import resize
from common.seeds import derive_seed

WORDINGS = (
    *("{objects} with {background} background",) * 3,
    "a {objects} with {background} background",
    "a photo of a {objects} on a {background} background",
    "{objects}",
    "a photo of a {objects}",
)
"""Caption templates, drawn uniformly; the first three are fill50k's own. The last two do not
mention the background."""
COUNTED_WORDINGS = (
    "{counted} with {background} background",
    "a photo of {counted} on a {background} background",
    "{counted}",
)
"""Caption templates that count shapes of one kind and one colour: "two red circles"."""
VOCABULARY = (
    *NAMES,
    *KINDS,
    *(f"{kind}s" for kind in KINDS),
    *NUMBER_WORDS.values(),
    *(wording.format(objects="next to", background="") for wording in WORDINGS),
)
"""All words of the captions."""
PAIRS = ("two", "touching", "cut")  # the layouts of two circles in two colours
# Least radii of drawn shapes, as fractions of the side; a latent is 1/16 of it.
SMALLEST, SMALLEST_CIRCLE = 0.14, 0.085
FINER = 4  # control images are drawn at this multiple of the size, then area-averaged


@dataclasses.dataclass(frozen=True)
class Examples:
    """N pictures with captions and, optionally, control images."""

    images: Tensor
    """uint8 [N, 3, S, S]."""
    captions: list[str]
    """One text for each picture."""
    hints: Tensor | None = None
    """Control images, uint8 [N, 1, S, S], white outlines on black; None if there are none."""

    def __len__(self) -> int:
        return len(self.images)

    def __add__(self, other: "Examples") -> "Examples":
        """Both sets, this one first; control images are kept only if both sets have them."""
        both = self.hints is not None and other.hints is not None
        return Examples(
            torch.cat([self.images, other.images]),
            self.captions + other.captions,
            torch.cat([self.hints, other.hints]) if both else None,
        )


def described_scenes(
    count: int,
    seed: int,
    *,
    several_fraction: float = 0.65,
    three_fraction: float = 0.3,
    twin_fraction: float = 0.5,
    shared_fraction: float = 0.2,
    circle_fraction: float = 0.4,
) -> Iterator[tuple[Scene, str]]:
    """`count` scenes, each with a caption template for `describe`.

    Scene k depends on (seed, k) only. The fraction `several_fraction` shows two shapes or, in
    `three_fraction` of these, three. In `twin_fraction` of these scenes all shapes are circles, as
    in `circle_scene`; in `shared_fraction` all have one colour, and if they are of one kind as
    well, every second caption counts them. Of the scenes of one shape, the fraction
    `circle_fraction` shows a circle like fill50k's. Captions name shapes from left to right, as
    those of `common.data.layouts`: without an order a model of this size could not tell which of
    two blobs in the noise is the red one.
    """
    for k in range(count):
        random = np.random.default_rng(derive_seed(seed, k))
        several = random.random() < several_fraction
        number = 2 + (random.random() < three_fraction) if several else 1
        wordings = WORDINGS
        if random.random() < (twin_fraction if several else circle_fraction):
            scene = circle_scene(random, number)
        else:
            scene = draw_scene(random, count=number, smallest=SMALLEST, left_to_right=True)
        if several and random.random() < shared_fraction:
            scene = in_one_colour(scene)
            if scene.counted and random.random() < 0.5:
                wordings = COUNTED_WORDINGS
        yield scene, wordings[random.integers(len(wordings))]


def circle_scene(random: np.random.Generator, number: int) -> Scene:
    """A scene of `number` circles: one like fill50k's, or two or three small ones in any colours.

    Of the latter, every third is laid out as in `common.data.layouts`: apart from each other,
    touching, or cut by the border, in clearly different colours.
    """
    if number == 1:
        return draw_circle(random)
    if random.random() < 1 / 3:
        return draw_layout("three" if number == 3 else random.choice(PAIRS), random)
    return draw_scene(
        random,
        count=number,
        kinds=("circle",),
        smallest=SMALLEST_CIRCLE,
        largest=0.28 if number == 2 else 0.2,
        left_to_right=True,
    )


def drawn_examples(count: int, size: int, seed: int, **parts: float) -> Examples:
    """Pictures of `described_scenes` with their captions; `parts` are its fractions.

    Example k depends on (seed, k) only.
    """
    images, captions = [], []
    for scene, wording in _counted(described_scenes(count, seed, **parts), count):
        images.append(render(scene, size))
        captions.append(describe(scene, wording))
    return Examples(torch.stack(images), captions)


def circle_scenes(count: int, seed: int) -> list[Scene]:
    """`count` scenes of one circle like fill50k's; scene k depends on (seed, k) only."""
    return [draw_circle(np.random.default_rng(derive_seed(seed, k))) for k in range(count)]


def drawn_circles(count: int, size: int, seed: int) -> Examples:
    """`count` pairs like fill50k's: one circle, its outline, and fill50k's caption.

    Pair k depends on (seed, k) only.
    """
    scenes = circle_scenes(count, seed)
    images, hints = [], []
    for scene in _counted(scenes, count):
        images.append(render(scene, size))
        hints.append(resize(render_control(scene, FINER * size), size, "area")[:1])
    return Examples(torch.stack(images), [scene.caption for scene in scenes], torch.stack(hints))


def real_examples(root: Path, size: int, part: Part = "training") -> Examples:
    """The pairs of fill50k, area-averaged to `size`.

    Raises InputError if the data set is missing.
    """
    images, hints, captions = [], [], []
    for pair in tqdm(load_fill50k(root, part), desc="fill50k", unit="pair", dynamic_ncols=True):
        images.append(resize(pair.read_target(), size, "area"))
        hints.append(resize(pair.read_source(), size, "area")[:1])
        captions.append(pair.prompt)
    return Examples(torch.stack(images), captions, torch.stack(hints))


def in_one_colour(scene: Scene) -> Scene:
    """The scene with all shapes in the first shape's colour."""
    colour = scene.shapes[0].colour
    return dataclasses.replace(
        scene, shapes=tuple(dataclasses.replace(shape, colour=colour) for shape in scene.shapes)
    )


def describe(scene: Scene, wording: str) -> str:
    """The caption of a scene by a template of WORDINGS or, if it can be counted, COUNTED_WORDINGS.
    """
    return wording.format(
        objects=scene.objects, counted=scene.counted, background=scene.background
    )


def _counted(scenes: Iterable[Any], count: int) -> Iterable[Any]:
    return tqdm(scenes, desc="drawing", total=count, unit="picture", dynamic_ncols=True)
