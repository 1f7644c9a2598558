"""Study of the base model: shapes and colours of images from prompts, without ControlNet."""

import time
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.colour import CSS_COLOURS, NAMES, colour_difference
from common.data.shapes import KINDS, VISIBLE, Scene, draw_scene, render
from common.images import resize
from common.latent.generate import GenerationConfig, Request
from common.latent.model import LatentDiffusion
from common.latent.save_pictures import draw
from common.metrics.segmentation import (
    SIZE,
    inner_region,
    judge_colour,
    median_colour,
    segment,
    separate,
)
from common.metrics.shapes import recognise
from common.seeds import derive_seeds
from p3_controlnet.evaluate import assign_colours
from p3_controlnet.study.failures import OWN_COLOUR

PROMPT_SEED, PROMPT_COUNT = 2025, 200
SMALLEST_OBJECT = 0.005  # fraction of the image; a star of the smallest radius covers twice that


def prompt_scenes(count: int = PROMPT_COUNT, seed: int = PROMPT_SEED) -> list[Scene]:
    """Scenes whose captions are the study's prompts: one shape and two shapes, alternating.

    The kinds of the shapes are random. The first shapes go through all CSS colours in a shuffled
    order. All colours of a scene differ by a CIEDE2000 of at least VISIBLE, since a shape in the
    background's colour could not be found. Scene k depends on `seed` and k only.
    """
    order = np.random.default_rng(seed).permutation(len(NAMES))
    return [
        _prompt_scene(np.random.default_rng([seed, k]), NAMES[order[k % len(NAMES)]], 1 + k % 2)
        for k in range(count)
    ]


def _prompt_scene(random: np.random.Generator, colour: str, shapes: int) -> Scene:
    while True:
        scene = draw_scene(random, count=shapes, first=(colour, KINDS[random.integers(len(KINDS))]))
        colours = [
            CSS_COLOURS[name]
            for name in (scene.background, *(shape.colour for shape in scene.shapes))
        ]
        if all(
            colour_difference(a, b) >= VISIBLE for i, a in enumerate(colours) for b in colours[:i]
        ):
            return scene


def measure_base(
    model: LatentDiffusion, scenes: Sequence[Scene], generation: GenerationConfig
) -> dict[str, Any]:
    """Draws the scenes' captions and measures the images; see `measure_pictures`.

    Also returns the seconds of drawing.
    """
    started = time.monotonic()
    pictures = draw_prompts(model, [scene.caption for scene in scenes], generation)
    seconds = time.monotonic() - started
    return measure_pictures(pictures, scenes, model.side) | {"seconds": seconds}


def measure_renderings(scenes: Sequence[Scene], side: int) -> dict[str, Any]:
    """What `measure_pictures` finds in the scenes themselves, rendered at a model's `side`.

    A measure that is right has no errors here.
    """
    pictures = torch.stack([resize(render(scene, side), SIZE) for scene in scenes])
    return measure_pictures(pictures, scenes, side)


def measure_pictures(pictures: Tensor, scenes: Sequence[Scene], side: int) -> dict[str, Any]:
    """Measures images uint8 [N, 3, 512, 512] of the scenes' captions, see `measure_scene`.

    `side` is the side of the images that the model draws, before they are enlarged. Returns means
    over all regions (objects and backgrounds), means over objects and over backgrounds, counts of
    missing objects and of images without any, and the five worst images. "shape_right" is the
    fraction of the prompts with one shape whose image shows that shape; "bound" is the fraction of
    the prompts with several shapes whose image shows each of them in its own colour, within
    OWN_COLOUR. An image with more objects than named counts for neither. Both are None without such
    prompts. "by_kind" is the fraction of the objects of each kind that are in their shape.
    """
    lines = [
        measure_scene(picture, scene, side) for picture, scene in zip(pictures, scenes, strict=True)
    ]
    parts = {
        part: [region for line in lines for region in line[part]]
        for part in ("objects", "background")
    }
    regions = parts["objects"] + parts["background"]
    worst = sorted(
        lines,
        key=lambda line: -fmean(region["error"] for region in line["objects"] + line["background"]),
    )
    return {
        "regions": len(regions),
        "error": fmean(region["error"] for region in regions),
        "right": fmean(region["right"] for region in regions),
        **{
            f"{part}_error": fmean(region["error"] for region in found)
            for part, found in parts.items()
        },
        **{
            f"{part}_right": fmean(region["right"] for region in found)
            for part, found in parts.items()
        },
        "without_object": sum(
            all(region["nearest"] is None for region in line["objects"]) for line in lines
        ),
        "missing_objects": sum(region["nearest"] is None for region in parts["objects"]),
        "shape_right": _mean(
            line["objects"][0]["shape_right"] and not line["extra"]
            for line in lines
            if len(line["objects"]) == 1
        ),
        "bound": _mean(
            all(each["shape_right"] and each["error"] <= OWN_COLOUR for each in line["objects"])
            and not line["extra"]
            for line in lines
            if len(line["objects"]) > 1
        ),
        "by_kind": {
            kind: _mean(each["shape_right"] for each in parts["objects"] if each["shape"] == kind)
            for kind in KINDS
        },
        "worst": worst[:5],
    }


def draw_prompts(
    model: LatentDiffusion, prompts: Sequence[str], generation: GenerationConfig
) -> Tensor:
    """Images uint8 [N, 3, 512, 512] from prompts, without ControlNet.

    The noise of image k depends on the run's seed and k only.
    """
    seeds = derive_seeds(generation.seed, count=len(prompts))
    jobs = [Request(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    return torch.cat([pictures for _, pictures in draw(model, jobs, generation, SIZE)])


def measure_scene(picture: Tensor, scene: Scene, resolution: int) -> dict[str, Any]:
    """Compares the shapes and colours in one image uint8 [3, 512, 512] with those of its caption.

    The colour of an object or of the background is the median over its pixels at least 4 pixels of
    the model's resolution inside its edge. The objects are found from the image alone
    (`common.metrics.segmentation.segment`) and assigned to the named colours so that the errors are
    lowest. Each is then compared with the shape of the assigned colour ("drawn" is the kind that
    fits best, "fit" its IoU, see `common.metrics.shapes`). A missing object has the error 50; in an
    image without any, so has the background. "extra" is the number of further objects.
    """
    names = [shape.colour for shape in scene.shapes]
    kinds = {shape.colour: shape.kind for shape in scene.shapes}
    labels = segment(picture, len(set(names)))
    found = [
        part
        for label in labels.unique().tolist()
        if label
        for part in separate(labels == label, SMALLEST_OBJECT)
    ]
    extra = max(0, len(found) - len(names))
    found = sorted(found, key=lambda part: -int(part.sum()))[: len(names)]
    absent = [None] * (len(names) - len(found))
    measured = [median_colour(picture, inner_region(part, resolution)) for part in found] + absent
    fits = [recognise(part) for part in found] + absent
    objects = []
    for (name, score), fit in zip(assign_colours(measured, names), fits, strict=True):
        objects.append(
            {
                "asked": name,
                "shape": kinds[name],
                "drawn": fit and fit.kind,
                "fit": fit.iou if fit else 0.0,
                "shape_right": fit is not None and fit.shows(kinds[name]),
                **score._asdict(),
            }
        )
    ground = median_colour(picture, inner_region(labels == 0, resolution)) if found else None
    return {
        "prompt": scene.caption,
        "extra": extra,
        "objects": objects,
        "background": [
            {"asked": scene.background, **judge_colour(ground, scene.background)._asdict()}
        ],
    }


def _mean(values: Iterable[bool]) -> float | None:
    values = list(values)
    return fmean(values) if values else None
