"""Study of a canvas of 4 x 4 times the model's image size, drawn at once or in patches."""

import dataclasses
import time
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from common.data.examples import FINER
from common.data.layouts import caption, make_canvas, render_control, render_target
from common.data.shapes import OUTLINE
from common.images import resize
from common.latent.generate import ControlledGenerationConfig, Request
from common.latent.model import LatentDiffusion
from common.latent.save_pictures import draw
from common.metrics.segmentation import SIZE
from common.seeds import derive_seed
from p3_controlnet.evaluate import means
from p3_controlnet.hints import resize_hint
from p3_controlnet.patches import patched
from p3_controlnet.study.prompts import PROMPT_SEED
from p3_controlnet.study.tasks import Task, measure_tasks, true_circles

CANVAS_PARTS = 4  # the canvas's side, in sides of the model's images
CANVAS_CIRCLES, CANVAS_SEEDS = 7, 3


def canvas_task(model: LatentDiffusion, seed: int, size: int = SIZE) -> tuple[Task, Tensor]:
    """A scene on a canvas of 4 x 4 model images: its task, and the hint at the canvas's own size.

    The task's control and target images are uint8 [3, size, size], and its circles are in pixels of
    512. The hint is uint8 [3, 4 S, 4 S], where S is the side of the model's images.
    """
    scene = make_canvas(CANVAS_CIRCLES, CANVAS_PARTS, PROMPT_SEED + seed)
    side = CANVAS_PARTS * model.side
    control = render_control(scene, FINER * side, OUTLINE / CANVAS_PARTS)
    task = Task(
        f"canvas/{seed}.png",
        caption(scene, "single"),
        resize_hint(control, size),
        render_target(scene, size),
        true_circles(scene),
    )
    return task, resize(control, side, "area")


def draw_canvas(
    model: LatentDiffusion,
    task: Task,
    hint: Tensor,
    stride: int | None,
    generation: ControlledGenerationConfig,
    size: int = SIZE,
) -> Tensor:
    """Draws a canvas, uint8 [3, size, size], in patches at `stride` latents; None draws it at once.

    `hint` is uint8 [3, H, W] and sets the size at which the canvas is drawn.
    """
    network = (
        patched(model.apply_model, model.latent_side, stride, model.downscale) if stride else None
    )
    job = Request(task.prompt, derive_seed(generation.seed, 0), hint)
    generation = dataclasses.replace(generation, chunk_size=1)
    chunks = draw(
        model,
        [job],
        generation,
        size,
        latent_side=hint.shape[-1] // model.downscale,
        network=network,
        show_progress=False,
    )
    return next(chunks)[1][0]


def measure_canvas(
    model: LatentDiffusion, stride: int | None, count: int, generation: ControlledGenerationConfig
) -> dict[str, Any]:
    """Mean measures over `count` canvases, each resized to 512x512, and the seconds of drawing."""
    started = time.monotonic()
    tasks, hints = zip(*(canvas_task(model, seed) for seed in range(count)), strict=True)
    pictures = [
        draw_canvas(model, task, hint, stride, generation)
        for task, hint in zip(tasks, hints, strict=True)
    ]
    seconds = time.monotonic() - started
    lines = measure_tasks(tasks, torch.stack(pictures), min(CANVAS_PARTS * model.side, SIZE))
    each = [value for line in lines for value in line["iou_circles"]]
    return {**means(lines), "iou_each": fmean(each), "seconds": seconds}
