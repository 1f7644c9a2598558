"""Pictures with captions and control images at a small size: drawn scenes and fill50k's pairs."""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.colour import NAMES
from common.data.fill50k import Part, load_fill50k
from common.data.layouts import draw_layout, render_control
from common.data.shapes import KINDS, NUMBER_WORDS, Scene, draw_circle, draw_scene, render
from common.errors import InputError
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
OFTEN_CORNERED = ("circle", *("square",) * 2, "triangle", *("star",) * 3)
"""Kinds of drawn shapes in described scenes, drawn uniformly: after 350,000 pictures with as many
of each, circles and triangles had their form, some squares were bent and most stars crooked."""
PAIRS = ("two", "touching", "cut")  # the layouts of two circles in two colours
# Least radii of drawn shapes, as fractions of the side; a latent is 1/16 of it.
SMALLEST, SMALLEST_CIRCLE = 0.14, 0.085
FINER = 4  # control images are drawn at this multiple of the size, then area-averaged


class Example(NamedTuple):
    """A picture and, optionally, its control image."""

    image: Tensor
    """uint8 [3, S, S]."""
    hint: Tensor | None = None
    """Control image, uint8 [1, S, S] or, if it has colours, [3, S, S]."""


class ExampleDataset(Dataset[Example]):
    """Pictures with captions; a picture is drawn or read when its index is asked for."""

    size: int
    """Side of the pictures in pixels."""
    captions: list[str]
    """One text for each picture."""

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> Example:
        raise NotImplementedError

    def __add__(self, other: "ExampleDataset") -> "ExampleDataset":
        """Both sets, this one first."""
        return _Joined(self, other)

    def where(self, index: int) -> str:
        """The example in words, for messages."""
        return f"example {index}"

    def stamp(self, index: int) -> int:
        """A number that changes with the sizes of the example's files; 0 if it has none."""
        return 0

    def identity(self) -> Iterator[str]:
        """Texts that are equal only for sets of the same examples, by captions and file names."""
        raise NotImplementedError

    def hash(self) -> str:
        """A hash of `identity`."""
        digest = hashlib.blake2b(digest_size=16)
        for text in self.identity():
            digest.update(text.encode() + b"\0")
        return digest.hexdigest()


class _Joined(ExampleDataset):
    def __init__(self, first: ExampleDataset, second: ExampleDataset) -> None:
        if first.size != second.size:
            raise ValueError(f"pictures of {first.size} and of {second.size} pixels in one set")
        self._parts, self.size = (first, second), first.size
        self.captions = first.captions + second.captions

    def __getitem__(self, index: int) -> Example:
        part, own = self._find(index)
        return part[own]

    def where(self, index: int) -> str:
        part, own = self._find(index)
        return part.where(own)

    def stamp(self, index: int) -> int:
        part, own = self._find(index)
        return part.stamp(own)

    def _find(self, index: int) -> tuple[ExampleDataset, int]:
        first, second = self._parts
        return (first, index) if index < len(first) else (second, index - len(first))

    def identity(self) -> Iterator[str]:
        for part in self._parts:
            yield from part.identity()


class DrawnCircles(ExampleDataset):
    """`count` pairs like fill50k's: circles and their outlines, with fill50k's wording.

    The fraction `several_fraction` shows two or three circles (`circle_scene`), the rest one. In
    the fraction `blank_fraction` the circles are left out of the picture and the control image, but
    not out of the caption. Pair k depends on (seed, k) only.
    """

    def __init__(
        self,
        count: int,
        size: int,
        seed: int,
        several_fraction: float = 0.0,
        blank_fraction: float = 0.0,
    ) -> None:
        self.size, self._seed = size, seed
        self._scenes = circle_scenes(count, seed, several_fraction)
        self.captions = [scene.caption for scene in self._scenes]
        self._blank = [
            k
            for k in range(count)
            if blank_fraction > 0.0 and np.random.default_rng([seed, k]).random() < blank_fraction
        ]
        for k in self._blank:
            self._scenes[k] = dataclasses.replace(self._scenes[k], shapes=())

    def __getitem__(self, index: int) -> Example:
        scene = self._scenes[index]
        hint = resize(render_control(scene, FINER * self.size), self.size, "area")[:1]
        return Example(render(scene, self.size), hint)

    def identity(self) -> Iterator[str]:
        yield from ("drawn circles", str(self._seed), *self.captions, *map(str, self._blank))


class DrawnScenes(ExampleDataset):
    """Pictures of `described_scenes` with their captions; `fractions` are its fractions.

    Example k depends on (seed, k) only.
    """

    def __init__(self, count: int, size: int, seed: int, **fractions: float) -> None:
        self.size, self._seed = size, seed
        described = list(described_scenes(count, seed, **fractions))
        self._scenes = [scene for scene, _ in described]
        self.captions = [describe(scene, wording) for scene, wording in described]

    def __getitem__(self, index: int) -> Example:
        return Example(render(self._scenes[index], self.size))

    def identity(self) -> Iterator[str]:
        yield from ("drawn scenes", str(self._seed), *self.captions)


class RealPairs(ExampleDataset):
    """The pairs of fill50k, area-averaged to `size`; without control images if `hints` is off.

    Raises InputError if the data set is missing, and on a pair that cannot be read, with its line
    of prompt.json.
    """

    def __init__(
        self, root: Path, size: int, part: Part = "training", *, hints: bool = True
    ) -> None:
        self.size, self._hints, self._prompts = size, hints, Path(root) / part / "prompt.json"
        self._pairs = load_fill50k(root, part)
        self.captions = [pair.prompt for pair in self._pairs]

    def __getitem__(self, index: int) -> Example:
        pair = self._pairs[index]
        try:
            image = resize(pair.read_target(), self.size, "area")
            hint = resize(pair.read_source(), self.size, "area") if self._hints else None
        except InputError as error:
            raise InputError(f"{self.where(index)}: {error}") from None
        if hint is not None and (hint == hint[:1]).all():
            hint = hint[:1]
        return Example(image, hint)

    def where(self, index: int) -> str:
        return f"{self._prompts}, line {self._pairs[index].line}"

    def stamp(self, index: int) -> int:
        pair = self._pairs[index]
        return (pair.source.stat().st_size << 31) + pair.target.stat().st_size

    def identity(self) -> Iterator[str]:
        yield "real pairs with hints" if self._hints else "real pairs"
        for pair in self._pairs:
            yield from (pair.prompt, pair.source.name, pair.target.name)


@dataclasses.dataclass(frozen=True)
class Examples:
    """N pictures in memory with captions and, optionally, control images."""

    images: Tensor
    """uint8 [N, 3, S, S]."""
    captions: list[str]
    """One text for each picture."""
    hints: Tensor | None = None
    """Control images, uint8 [N, 1, S, S], white outlines on black; None if there are none."""

    def __len__(self) -> int:
        return len(self.images)


def in_memory(data: ExampleDataset) -> Examples:
    """All pictures of a small set at once."""
    examples = [data[k] for k in Progress(range(len(data)), desc="making", unit="pictures")]
    hints = [example.hint for example in examples if example.hint is not None]
    images = torch.stack([example.image for example in examples])
    return Examples(images, data.captions, torch.stack(hints) if hints else None)


def described_scenes(
    count: int,
    seed: int,
    *,
    several_fraction: float = 0.65,
    three_fraction: float = 0.3,
    twin_fraction: float = 0.3,
    shared_fraction: float = 0.2,
    circle_fraction: float = 0.25,
) -> Iterator[tuple[Scene, str]]:
    """`count` scenes, each with a caption template for `describe`.

    Scene k depends on (seed, k) only. The fraction `several_fraction` shows two shapes or, in
    `three_fraction` of these, three. In `twin_fraction` of these scenes all shapes are circles, as
    in `circle_scene`; in `shared_fraction` all have one colour, and if they are of one kind as
    well, every second caption counts them. Of the scenes of one shape, the fraction
    `circle_fraction` shows a circle like fill50k's. Other scenes take their shapes from
    OFTEN_CORNERED. Captions name shapes from left to right, as
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
            scene = draw_scene(
                random, count=number, kinds=OFTEN_CORNERED, smallest=SMALLEST, left_to_right=True
            )
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


def drawn_examples(count: int, size: int, seed: int, **fractions: float) -> Examples:
    """`DrawnScenes` in memory."""
    return in_memory(DrawnScenes(count, size, seed, **fractions))


def circle_scenes(count: int, seed: int, several_fraction: float = 0.0) -> list[Scene]:
    """`count` scenes of circles, see `circle_scene`; scene k depends on (seed, k) only.

    The fraction `several_fraction` shows two or three circles, the rest one.
    """
    scenes = []
    for k in range(count):
        random = np.random.default_rng(derive_seed(seed, k))
        several = several_fraction > 0.0 and random.random() < several_fraction
        scenes.append(circle_scene(random, int(random.integers(2, 4)) if several else 1))
    return scenes


def drawn_circles(count: int, size: int, seed: int) -> Examples:
    """`DrawnCircles` in memory."""
    return in_memory(DrawnCircles(count, size, seed))


def in_one_colour(scene: Scene) -> Scene:
    """The scene with all shapes in the first shape's colour."""
    colour = scene.shapes[0].colour
    return dataclasses.replace(
        scene, shapes=tuple(dataclasses.replace(shape, colour=colour) for shape in scene.shapes)
    )


def describe(scene: Scene, wording: str) -> str:
    """The caption of a scene by a template of WORDINGS or COUNTED_WORDINGS."""
    return wording.format(objects=scene.objects, counted=scene.counted, background=scene.background)
