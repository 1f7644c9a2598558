"""The studies of Problem 3, 2025, as results/p3_controlnet_*.json.

    python3 -m p3_controlnet.study.sweeps base                                     (no control: colours named by 200 prompts)
    python3 -m p3_controlnet.study.sweeps autoencoder --fill50k hw2_data/fill50k   (what the autoencoder alone loses)
    python3 -m p3_controlnet.study.sweeps circles --fill50k hw2_data/fill50k       (the real testing pairs, by scale and guidance)
    python3 -m p3_controlnet.study.sweeps two_circles                              (two and three circles, touching, cut)
    python3 -m p3_controlnet.study.sweeps canvas                                   (patches on a canvas of 4 x 4 pictures)

Each finished row is saved, and a second call goes on with the missing ones.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from common import cli
from common.checkpoint import state_hash
from common.colour import CSS_COLOURS, NAMES, colour_difference
from common.data.examples import FINER, shrink
from common.data.layouts import (
    LAYOUT_COUNT,
    LayoutKind,
    Wording,
    caption,
    make_canvas,
    make_layouts,
    parse_caption,
    render_control,
    render_target,
)
from common.data.shapes import KINDS, OUTLINE, VISIBLE, Scene, draw_scene
from common.devices import DeviceName, pick_device
from common.diffusion.samplers import count_evaluations
from common.diffusion.schedule import SPACINGS
from common.errors import InputError
from common.files import ROOT, shown, write_json
from common.images import to_model_range, to_uint8
from common.latent.generate import GenerationConfig, Request, check_generation, settled
from common.latent.load import load_base
from common.latent.model import LatentDiffusion
from common.latent.save_pictures import draw, enlarge
from common.latent.small import psnr
from common.metrics.segmentation import SIZE, inner_region, judge_colour, median_colour, segment, separate
from common.seeds import derive_seed, derive_seeds
from common.study import measured_rows
from p3_controlnet.evaluate import assign_colours, means
from p3_controlnet.inference import SHIPPED_BASE, SHIPPED_CONTROL, ModelConfig, load_model, resize_hint
from p3_controlnet.patches import patched
from p3_controlnet.study.tasks import Task, draw_tasks, layout_tasks, measure_tasks, real_tasks, true_circles

Study = Literal["base", "autoencoder", "circles", "two_circles", "canvas"]
PROMPT_SEED, PROMPT_COUNT = 2025, 200
IOU_BAR, COLOUR_BAR = 0.9, 8.0  # what a picture of several circles must reach
SMALLEST_OBJECT = 0.005  # of the picture; a star of the smallest radius covers twice as much

# What differs from the default generation. A guided pair is one evaluation, and all are within 25.
BASE_SWEEP: tuple[dict[str, Any], ...] = (
    {},
    *({"guidance_scale": scale} for scale in (1.0, 1.5, 3.0, 4.0, 6.0)),
    {"guidance_rescale": 0.7},
    {"spacing": "leading"},
)
CIRCLES_SWEEP: tuple[dict[str, Any], ...] = (
    {},
    *({"guidance_scale": scale} for scale in (1.0, 1.5, 3.0, 4.0, 6.0)),
    *({"control_scales": (scale,)} for scale in (0.0, 0.5, 0.75, 1.25, 1.5)),
    *({"control_end": end} for end in (0.25, 0.5)),
    {"guess_mode": True},
    {"steps": 10},
    {"steps": 25},
)
SETS: tuple[tuple[LayoutKind, Wording], ...] = (
    ("two", "each"),
    ("two_shared", "each"),
    ("two_shared", "count"),
    ("two_shared", "single"),
    ("three", "each"),
    ("touching", "each"),
    ("cut", "each"),
)
SEEDS = (0, 1)
CANVAS_PARTS, CANVAS_CIRCLES, CANVAS_SEEDS = 4, 7, 3
STRIDES = (0.5, 1.0, None)  # as parts of a patch; None: the whole canvas at once


@dataclasses.dataclass(frozen=True)
class Config:
    """Runs a study of Problem 3, 2025, on the small model."""

    study: tyro.conf.Positional[Study]
    """Which study."""
    checkpoint: Path = SHIPPED_BASE
    """The base model's folder."""
    control: Path = SHIPPED_CONTROL
    """The ControlNet's folder."""
    fill50k: Path | None = None
    """The real pairs in the homework's layout, for the studies autoencoder and circles."""
    results: Path = ROOT / "results"
    """Folder of p3_controlnet_STUDY.json."""
    count: int | None = None
    """Measure on so many prompts, pairs or layouts only (default: 200 prompts, all pairs, ten layouts)."""
    default_only: bool = False
    """Measure the default sampling alone, in the studies base and circles."""
    steps: int = GenerationConfig().steps
    """Steps of the solver, where the study does not vary them."""
    device: DeviceName = "auto"
    """Where to compute."""


def main(config: Config) -> None:
    """Adds the missing rows to the study's file."""
    if config.count is not None and config.count < 1:
        raise InputError(f"--count must be at least 1, not {config.count}")
    default = GenerationConfig(steps=config.steps)
    check_generation(default)
    if config.study in ("autoencoder", "circles") and config.fill50k is None:
        raise InputError(f"the study {config.study} measures the real testing pairs: name their folder with --fill50k")
    device = pick_device(config.device)
    if config.study in ("base", "autoencoder"):
        model = load_base(config.checkpoint).to(device)
    else:
        model = load_model(ModelConfig(config.checkpoint, control=config.control)).to(device).eval()
    STUDIES[config.study](config, model, default)


def base_study(config: Config, model: LatentDiffusion, default: GenerationConfig) -> None:
    """Colours of pictures without control, for each guidance."""
    scenes = prompt_scenes(config.count or PROMPT_COUNT)
    plan = [
        (
            _key(config, model, generation) | {"prompts": len(scenes)},
            functools.partial(measure_base, model, scenes, generation),
        )
        for generation in _varied(config, default, BASE_SWEEP)
    ]
    measured_rows(*_file(config), plan, ("error", "right", "without_object", "seconds"))


def circles_study(config: Config, model: LatentDiffusion, default: GenerationConfig) -> None:
    """Shape and colours on the real testing pairs, for each guidance and control scale. The default's row names every line."""
    tasks = real_tasks(config.fill50k)[: config.count]
    plan = [
        (
            _key(config, model, generation) | {"pairs": len(tasks)},
            functools.partial(measure_circles, model, tasks, generation, lines=generation == default),
        )
        for generation in _varied(config, default, CIRCLES_SWEEP)
    ]
    measured_rows(*_file(config), plan, ("iou", "circle_error", "background_error", "seconds"))


def two_circles_study(config: Config, model: LatentDiffusion, default: GenerationConfig) -> None:
    """Layouts that no training shows: in each wording, from two seeds."""
    plan = []
    for kind, wording in SETS:
        tasks = layout_tasks(kind, wording, config.count or LAYOUT_COUNT)
        for seed in SEEDS:
            generation = dataclasses.replace(default, seed=seed)
            key = {"kind": kind, "wording": wording, "layouts": len(tasks)} | _key(config, model, generation)
            # Only this wording names the scene's own shapes.
            scenes = make_layouts(kind, len(tasks)) if wording == "each" else ()
            plan.append((key, functools.partial(measure_several, model, tasks, generation, scenes)))
    measured_rows(*_file(config), plan, ("kind", "wording", "iou", "iou_each", "circle_error", "failed"))


def canvas_study(config: Config, model: LatentDiffusion, default: GenerationConfig) -> None:
    """Many circles on a canvas of 4 x 4 pictures, in patches with and without overlap, and at once."""
    plan = []
    for part in STRIDES:
        stride = None if part is None else max(1, int(part * model.latent_side))
        key = {"stride": stride, "canvases": config.count or CANVAS_SEEDS} | _key(config, model, default)
        plan.append((key, functools.partial(measure_canvas, model, stride, config.count or CANVAS_SEEDS, default)))
    measured_rows(*_file(config), plan, ("stride", "iou", "circle_error", "background_error", "seconds"))


def autoencoder_study(config: Config, model: LatentDiffusion, default: GenerationConfig) -> None:
    """The real targets at the model's size through the autoencoder, which no drawn picture can be better than."""
    tasks = real_tasks(config.fill50k)[: config.count]
    images = torch.stack([shrink(task.target, model.side) for task in tasks])
    x = to_model_range(images).to(model.unet.device)
    again = torch.cat([model.decode(model.encode(part)) for part in x.split(16)]).clamp(-1.0, 1.0)
    each = [psnr(a[None], b[None]) for a, b in zip(x, again, strict=True)]
    measured = {}
    for name, pictures in (("resized", images), ("reconstructed", to_uint8(again).cpu())):
        lines = measure_tasks(tasks, torch.stack([enlarge(picture, SIZE) for picture in pictures]), model.side)
        measured[name] = means(lines)
    path, command = _file(config)
    result = {"model": shown(config.checkpoint), "pairs": len(tasks), "side": model.side, "psnr": psnr(x, again)}
    write_json(path, {"command": command, **result, "psnr_worst": min(each), **measured})
    print(f"PSNR {result['psnr']:.1f} dB at {model.side}x{model.side}, the worst of {len(tasks)} {min(each):.1f} dB")


STUDIES = {
    "base": base_study,
    "autoencoder": autoencoder_study,
    "circles": circles_study,
    "two_circles": two_circles_study,
    "canvas": canvas_study,
}


# ----------------------------------------------------------------------------
# Without control.


def prompt_scenes(count: int = PROMPT_COUNT, seed: int = PROMPT_SEED) -> list[Scene]:
    """Scenes to be named in prompts: one or two shapes of any kind, taking turns, the first shapes in every CSS colour in a
    shuffled order; all colours of a scene visibly different, since nothing can tell a shape from a background of its colour.
    """
    order = np.random.default_rng(seed).permutation(len(NAMES))
    return [
        _prompt_scene(np.random.default_rng([seed, k]), NAMES[order[k % len(NAMES)]], 1 + k % 2) for k in range(count)
    ]


def _prompt_scene(random: np.random.Generator, colour: str, shapes: int) -> Scene:
    while True:
        scene = draw_scene(random, count=shapes, first=(colour, KINDS[random.integers(len(KINDS))]))
        colours = [CSS_COLOURS[name] for name in (scene.background, *(shape.colour for shape in scene.shapes))]
        if all(colour_difference(a, b) >= VISIBLE for i, a in enumerate(colours) for b in colours[:i]):
            return scene


def measure_base(model: LatentDiffusion, scenes: Sequence[Scene], generation: GenerationConfig) -> dict[str, Any]:
    """Means over all regions of the pictures, and the five worst pictures; see `measure_colours`."""
    started = time.monotonic()
    pictures = draw_prompts(model, [scene.caption for scene in scenes], generation)
    seconds = time.monotonic() - started
    lines = [measure_colours(picture, scene, model.side) for picture, scene in zip(pictures, scenes, strict=True)]
    parts = {part: [region for line in lines for region in line[part]] for part in ("objects", "background")}
    regions = parts["objects"] + parts["background"]
    worst = sorted(lines, key=lambda line: -_mean(region["error"] for region in line["objects"] + line["background"]))
    return {
        "regions": len(regions),
        "error": _mean(region["error"] for region in regions),
        "right": _mean(region["right"] for region in regions),
        **{f"{part}_error": _mean(region["error"] for region in found) for part, found in parts.items()},
        **{f"{part}_right": _mean(region["right"] for region in found) for part, found in parts.items()},
        "without_object": sum(all(region["nearest"] is None for region in line["objects"]) for line in lines),
        "missing_objects": sum(region["nearest"] is None for region in parts["objects"]),
        "seconds": seconds,
        "worst": worst[:5],
    }


def draw_prompts(model: LatentDiffusion, prompts: Sequence[str], generation: GenerationConfig) -> Tensor:
    """Pictures uint8 [N, 3, 512, 512] of prompts, without control; picture k from the seed (run's seed, k)."""
    seeds = derive_seeds(generation.seed, count=len(prompts))
    jobs = [Request(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    return torch.cat([pictures for _, pictures in draw(model, jobs, generation, SIZE)])


def measure_colours(picture: Tensor, scene: Scene, resolution: int) -> dict[str, Any]:
    """The median colours of a picture's objects and background, uint8 [3, 512, 512], at least 4 pixels of the model's
    resolution inside their edges, against the names in the scene's caption.

    Where the objects are is found without sight of the scene (`common.metrics.segmentation.segment`); each named one counts as
    the region that suits it best. A missing one, and in a picture without any the background too, counts as error 50.
    """
    names = [shape.colour for shape in scene.shapes]
    labels = segment(picture, len(set(names)))
    found = [part for label in labels.unique().tolist() if label for part in separate(labels == label, SMALLEST_OBJECT)]
    found = sorted(found, key=lambda part: -int(part.sum()))[: len(names)]
    measured = [median_colour(picture, inner_region(part, resolution)) for part in found]
    objects = assign_colours(measured + [None] * (len(names) - len(found)), names)
    ground = median_colour(picture, inner_region(labels == 0, resolution)) if found else None
    return {
        "prompt": scene.caption,
        "objects": [{"asked": name, **score._asdict()} for name, score in objects],
        "background": [{"asked": scene.background, **judge_colour(ground, scene.background)._asdict()}],
    }


# ----------------------------------------------------------------------------
# With control.


def measure_circles(
    model: LatentDiffusion, tasks: Sequence[Task], generation: GenerationConfig, *, lines: bool
) -> dict[str, Any]:
    """The means of `p3_controlnet.evaluate`, and with `lines` the measures of each picture."""
    started = time.monotonic()
    pictures = draw_tasks(model, tasks, generation)
    seconds = time.monotonic() - started
    measured = measure_tasks(tasks, pictures, model.side)
    pairs = SPACINGS[generation.spacing](model.schedule.num_timesteps, generation.steps)
    evaluations = count_evaluations(generation.sampler, model.schedule, pairs)
    row = {"evaluations": evaluations, **means(measured), "seconds": seconds}
    return row | {"lines": measured} if lines else row


def measure_several(
    model: LatentDiffusion, tasks: Sequence[Task], generation: GenerationConfig, scenes: Sequence[Scene] = ()
) -> dict[str, Any]:
    """The means, the IoU of each circle, and what failed in which picture; for the scenes that the prompts describe also the
    circles' colour error in pictures from the same prompts and noise without control, wherever the circles are there."""
    lines = measure_tasks(tasks, draw_tasks(model, tasks, generation), model.side)
    for line in lines:
        line["failures"] = failures(line)
    each = [value for line in lines for value in line["iou_circles"]]
    failed = sum(bool(line["failures"]) for line in lines)
    found = {**means(lines), "iou_each": _mean(each), "iou_worst": min(each), "failed": failed}
    if scenes:
        found["uncontrolled_circle_error"] = measure_base(model, scenes, generation)["objects_error"]
    return found | {"lines": lines}


def failures(line: dict[str, Any]) -> list[str]:
    """What is wrong with a measured picture of circles, in words; circles are counted from the left."""
    if line["iou"] == 0.0:
        return ["no circle"]
    words = []
    each = zip(*(line[f"circle_{name}"] for name in ("errors", "asked", "nearest")), strict=True)
    for k, (overlap, colour) in enumerate(zip(line["iou_circles"], each, strict=True), 1):
        if overlap < 0.5:
            words.append(f"circle {k} is missing")
            continue
        if overlap < IOU_BAR:
            words.append(f"circle {k} is misshapen (IoU {overlap:.2f})")
        words += _colour_failure(f"circle {k}", *colour)
    asked = parse_caption(line["prompt"]).background
    return words + _colour_failure("the background", line["background_error"], asked, line["background_nearest"])


def _colour_failure(what: str, error: float, asked: str, nearest: str) -> list[str]:
    if error <= COLOUR_BAR:
        return []
    return [f"{what} is {nearest}, not {asked}" if nearest != asked else f"{what} is {error:.0f} away from {asked}"]


# ----------------------------------------------------------------------------
# Larger canvases.


def canvas_task(model: LatentDiffusion, seed: int, size: int = SIZE) -> tuple[Task, Tensor]:
    """A scene on a canvas of 4 x 4 pictures, its pictures at 512, and its control picture at the canvas' size of the model."""
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
    return task, shrink(control, side)


def draw_canvas(
    model: LatentDiffusion, task: Task, hint: Tensor, stride: int | None, generation: GenerationConfig, size: int = SIZE
) -> Tensor:
    """The canvas, uint8 [3, size, size], in patches at that stride (in latents), or at once."""
    network = patched(model.apply_model, model.latent_side, stride, model.downscale) if stride else None
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
    model: LatentDiffusion, stride: int | None, count: int, generation: GenerationConfig
) -> dict[str, Any]:
    """The means over `count` canvases, measured at 512 like any picture."""
    started = time.monotonic()
    tasks, hints = zip(*(canvas_task(model, seed) for seed in range(count)), strict=True)
    pictures = [draw_canvas(model, task, hint, stride, generation) for task, hint in zip(tasks, hints, strict=True)]
    seconds = time.monotonic() - started
    lines = measure_tasks(tasks, torch.stack(pictures), min(CANVAS_PARTS * model.side, SIZE))
    each = [value for line in lines for value in line["iou_circles"]]
    return {**means(lines), "iou_each": _mean(each), "seconds": seconds}


# ----------------------------------------------------------------------------
# Rows.


def _varied(config: Config, default: GenerationConfig, changes: Sequence[dict[str, Any]]) -> list[GenerationConfig]:
    """The default with each of the changes, once, or by itself if nothing else is asked for."""
    if config.default_only:
        return [default]
    return list(dict.fromkeys(dataclasses.replace(default, **change) for change in changes))


def _key(config: Config, model: LatentDiffusion, generation: GenerationConfig) -> dict[str, Any]:
    """Which model a row is of, and how its pictures were drawn."""
    sampling = dataclasses.asdict(settled(generation, model))
    del sampling["chunk_size"]  # changes no picture by more than one grey level
    control = {"control": shown(config.control)} if model.controlnet is not None else {}
    return {"model": shown(config.checkpoint), **control, "weights": state_hash(model), "sampling": sampling}


def _file(config: Config) -> tuple[Path, str]:
    """The study's file, and the command that makes it."""
    data = " --fill50k hw2_data/fill50k" if config.fill50k else ""
    return (
        config.results / f"p3_controlnet_{config.study}.json",
        f"python3 -m p3_controlnet.study.sweeps {config.study}{data}",
    )


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


if __name__ == "__main__":
    cli.run(main, Config)
