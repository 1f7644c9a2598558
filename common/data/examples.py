"""Pictures with captions and control images at a small size: drawn scenes and fill50k's pairs."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.colour import NAMES
from common.data.fill50k import Part, load_fill50k
from common.data.layouts import render_control
from common.data.shapes import KINDS, Scene, draw_circle, draw_scene, render
from common.images import resize
from common.progress import Progress
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
VOCABULARY = (
    *NAMES,
    *KINDS,
    *(wording.format(objects="next to", background="") for wording in WORDINGS),
)
"""All words of the captions."""
SMALLEST = 0.16  # least radius of drawn shapes, as a fraction of the side: 2.5 of 16 latents
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
    pair_fraction: float = 0.7,
    shared_fraction: float = 0.2,
    twin_fraction: float = 0.4,
    circle_fraction: float = 0.15,
) -> Iterator[tuple[Scene, str]]:
    """`count` scenes, each with a caption template for `describe`.

    Scene k depends on (seed, k) only. The fraction `pair_fraction` shows two shapes; of these,
    `shared_fraction` have one colour for both and `twin_fraction` are two circles. The fraction
    `circle_fraction` of all scenes shows one circle like fill50k's, and the rest one shape of any
    kind. Captions name pairs from left to right, as those of `common.data.layouts`: without an
    order a model of this size could not tell which of two blobs in the noise is the red one.
    """
    for k in range(count):
        random = np.random.default_rng(derive_seed(seed, k))
        lot = random.random()
        if pair_fraction <= lot < pair_fraction + circle_fraction:
            scene = draw_circle(random)
        else:
            pair = lot < pair_fraction
            kinds = ("circle",) if pair and random.random() < twin_fraction else KINDS
            scene = draw_scene(
                random, count=1 + pair, kinds=kinds, smallest=SMALLEST, left_to_right=True
            )
            if lot < pair_fraction * shared_fraction:
                scene = in_one_colour(scene)
        yield scene, WORDINGS[random.integers(len(WORDINGS))]


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
    for pair in Progress(load_fill50k(root, part), desc="reading fill50k", unit="pairs"):
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
    """The caption of a scene by a template of WORDINGS."""
    return wording.format(objects=scene.objects, background=scene.background)


def _counted(scenes: Iterable[Any], count: int) -> Iterable[Any]:
    return Progress(scenes, desc="drawing", unit="pictures", total=count)
