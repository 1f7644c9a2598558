"""Tasks, images to draw and to measure: fill50k's testing pairs, drawn pairs, and other layouts."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.data.fill50k import Pair, load_fill50k
from common.data.layouts import (
    LAYOUT_COUNT,
    LayoutKind,
    Wording,
    caption,
    make_layouts,
    parse_caption,
    render_control,
    render_target,
)
from common.data.shapes import Scene
from common.latent.generate import ControlledGenerationConfig, Request
from common.latent.model import LatentDiffusion
from common.latent.save_pictures import draw
from common.metrics.circles import Circle, fit_circles
from common.metrics.segmentation import SIZE
from p3_controlnet.evaluate import measure, read_description
from p3_controlnet.hints import image_seed, resize_hint


@dataclasses.dataclass(frozen=True)
class Task:
    """An image to draw, with its control image and what it should show."""

    name: str
    """File name, from which the image's seed is derived as in `p3_controlnet.inference`."""
    prompt: str
    source: Tensor
    """Control image, uint8 [3, 512, 512]."""
    target: Tensor
    """Target image, uint8 [3, 512, 512]."""
    circles: tuple[Circle, ...]
    """The true circles, in pixels of an image of 512x512."""


def real_tasks(root: Path) -> list[Task]:
    """The testing pairs of fill50k in `root`; with the same seed, `hw2_3.sh` draws the same images.

    Raises InputError if the pairs are missing.
    """
    return [read_task(pair) for pair in load_fill50k(root, "testing")]


def read_task(pair: Pair) -> Task:
    """The task of a pair on disk. Raises InputError as `read_description` of evaluate.py does."""
    source = pair.read_source()
    circles = tuple(fit_circles(source))
    read_description(pair, circles)  # checks that the pair can be measured
    return Task(pair.target.name, pair.prompt, source, pair.read_target(), circles)


def layout_tasks(
    kind: LayoutKind, wording: Wording = "each", count: int = LAYOUT_COUNT
) -> list[Task]:
    """Tasks of layouts of one kind (see `common.data.layouts.make_layouts`), in one wording."""
    return scene_tasks(make_layouts(kind, count), kind, wording)


def scene_tasks(scenes: Sequence[Scene], folder: str, wording: Wording = "each") -> list[Task]:
    """Tasks of scenes of circles, named FOLDER/0.png, FOLDER/1.png and so on."""
    return [
        Task(
            f"{folder}/{index}.png",
            caption(scene, wording),
            render_control(scene),
            render_target(scene),
            true_circles(scene),
        )
        for index, scene in enumerate(scenes)
    ]


def true_circles(scene: Scene) -> tuple[Circle, ...]:
    """The circles of a scene, in pixels of an image of 512x512."""
    return tuple(
        Circle(SIZE * shape.x, SIZE * shape.y, SIZE * shape.radius) for shape in scene.shapes
    )


def draw_tasks(
    model: LatentDiffusion,
    tasks: Sequence[Task],
    generation: ControlledGenerationConfig,
    *,
    show_progress: bool = True,
) -> Tensor:
    """Draws the tasks at the model's own size and resizes the images: uint8 [N, 3, 512, 512]."""
    jobs = [
        Request(
            task.prompt,
            image_seed(task.name, generation.seed),
            resize_hint(task.source, model.side),
        )
        for task in tasks
    ]
    return torch.cat(
        [
            pictures
            for _, pictures in draw(model, jobs, generation, SIZE, show_progress=show_progress)
        ]
    )


def measure_tasks(tasks: Sequence[Task], pictures: Tensor, resolution: int) -> list[dict[str, Any]]:
    """Name, prompt and `p3_controlnet.evaluate.measure` of each image in uint8 [N, 3, 512, 512].

    `resolution` is the side, in pixels, of the images that the model draws.
    """
    return [
        {"name": task.name, "prompt": task.prompt}
        | measure(picture, task.target, task.circles, parse_caption(task.prompt), resolution)
        for task, picture in zip(tasks, pictures, strict=True)
    ]
