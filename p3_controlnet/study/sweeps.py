"""Runs the studies of Problem 3, 2025, and writes their rows to results/p3_controlnet_*.json.

    # colour errors for 200 prompts, without ControlNet
    python3 -m p3_controlnet.study.sweeps base
    # reconstruction error of the autoencoder
    python3 -m p3_controlnet.study.sweeps autoencoder --fill50k hw2_data/fill50k
    # fill50k's testing pairs, by control scale, guidance scale and steps
    python3 -m p3_controlnet.study.sweeps circles --fill50k hw2_data/fill50k
    # two and three circles, touching circles, circles cut by the border
    python3 -m p3_controlnet.study.sweeps two_circles
    # a canvas of 4 x 4 model images, in patches and at once
    python3 -m p3_controlnet.study.sweeps canvas
    # size of the weights and time of a picture, with nothing else running
    python3 -m p3_controlnet.study.sweeps size

Each row is saved when it is finished; a second call measures the missing rows only. The study
autoencoder has no rows and is always measured anew.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal, TypeVar

import torch
import tyro

from common import cli
from common.checkpoint import state_hash
from common.data.layouts import LAYOUT_COUNT, LayoutKind, Wording
from common.devices import DeviceName, pick_device
from common.diffusion.samplers import count_evaluations
from common.diffusion.schedule import SPACINGS
from common.errors import InputError
from common.files import ROOT, shown, write_json
from common.images import resize, to_model_range, to_uint8
from common.latent.control import ControlText
from common.latent.generate import (
    ControlledGenerationConfig,
    GenerationConfig,
    with_default_guidance,
)
from common.latent.load import kind_of, load_base
from common.latent.model import LatentDiffusion
from common.latent.small import psnr
from common.metrics.segmentation import SIZE
from common.study import WEIGHTS, measured_rows
from p3_controlnet.evaluate import means
from p3_controlnet.loading import SHIPPED_BASE, SHIPPED_CONTROL, ModelConfig, load_model
from p3_controlnet.study.canvas import CANVAS_SEEDS, measure_canvas
from p3_controlnet.study.failures import OWN_COLOUR, failures
from p3_controlnet.study.prompts import (
    PROMPT_COUNT,
    measure_base,
    measure_renderings,
    prompt_scenes,
)
from p3_controlnet.study.report import binding
from p3_controlnet.study.tasks import Task, draw_tasks, layout_tasks, measure_tasks, real_tasks

ConfigT = TypeVar("ConfigT", bound=GenerationConfig)
Study = Literal["base", "autoencoder", "circles", "two_circles", "canvas", "size"]

# Differences from the default generation settings.
BASE_SWEEP: tuple[dict[str, Any], ...] = (
    {},
    {"pag_scale": 0.0},
    *({"guidance_scale": scale, "pag_scale": 0.0} for scale in (2.0, 6.0)),
    {"guidance_scale": 2.0},
    {"pag_scale": 6.0},
    {"spacing": "leading"},
    {"steps": 12},
)
CIRCLES_SWEEP: tuple[dict[str, Any], ...] = (
    {},
    *({"guidance_scale": scale} for scale in (1.0, 3.0, 6.0)),
    {"pag_scale": 3.0},
    *({"control_scales": (scale,)} for scale in (0.0, 0.5, 1.5)),
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
    ("one_wide", "each"),
    ("two_wide", "each"),
)
SEEDS = (0, 1)
STRIDES = (0.5, 1.0, None)  # as fractions of a patch's side; None draws the whole canvas at once


@dataclasses.dataclass(frozen=True)
class Config:
    """Runs a study of Problem 3, 2025, on the small model."""

    study: tyro.conf.Positional[Study]
    """The study to run."""
    checkpoint: Path = SHIPPED_BASE
    """Folder of the base model."""
    control: Path | None = None
    """ControlNet, a file or a folder; by default the shipped one for a small base, and for Stable
    Diffusion the one that hw2_3.sh would take."""
    fill50k: Path | None = None
    """Folder of fill50k, in the homework's layout; the studies autoencoder and circles need it."""
    results: Path = ROOT / "results"
    """Folder of the result file, p3_controlnet_STUDY.json."""
    count: int | None = None
    """Number of prompts, pairs, layouts of each kind or canvases to measure; by default 200
    prompts, all pairs, 10 layouts (of one kind in the study size), 3 canvases."""
    default_only: bool = False
    """Measure only the default sampling, in the studies base and circles."""
    steps: int = ControlledGenerationConfig().steps
    """Number of solver steps, except where the study varies it."""
    control_text: ControlText | None = None
    """Text that the ControlNet reads; by default that with which it was trained."""
    device: DeviceName = "auto"
    """Device to compute on; auto is CUDA if present, else MPS, else the CPU."""


def main(config: Config) -> None:
    """Runs the study and writes its result file, keeping the rows that are already there."""
    if config.count is not None and config.count < 1:
        raise InputError(f"--count must be at least 1, not {config.count}")
    default = ControlledGenerationConfig(steps=config.steps, control_text=config.control_text)
    default.check()
    if config.study in ("autoencoder", "circles") and config.fill50k is None:
        raise InputError(
            f"the study {config.study} measures the testing pairs of fill50k: name its folder with"
            " --fill50k"
        )
    device = pick_device(config.device)
    if config.study in ("base", "autoencoder"):
        model = load_base(config.checkpoint).to(device)
    else:
        found = ModelConfig(config.checkpoint, control=config.control)
        model = load_model(found, instead=False).to(device).eval()
    STUDIES[config.study](config, model, default)


def base_study(
    config: Config, model: LatentDiffusion, controlled: ControlledGenerationConfig
) -> None:
    """Colour errors of images without ControlNet, for each sampling in BASE_SWEEP.

    The row of the default sampling also holds "renderings": the same measures of the scenes
    themselves, which tell how far the measures can be trusted.
    """
    scenes = prompt_scenes(config.count or PROMPT_COUNT)
    default = GenerationConfig(steps=controlled.steps)

    def measured(generation: GenerationConfig) -> dict[str, Any]:
        row = measure_base(model, scenes, generation)
        if generation == default:
            row["renderings"] = measure_renderings(scenes, model.side)
        return row

    plan = [
        (
            _key(config, model, generation) | {"prompts": len(scenes)},
            functools.partial(measured, generation),
        )
        for generation in _varied(config, default, BASE_SWEEP)
    ]
    shown_entries = ("error", "right", "shape_right", "bound", "without_object", "seconds")
    measured_rows(*_file(config), plan, shown_entries)


def circles_study(
    config: Config, model: LatentDiffusion, default: ControlledGenerationConfig
) -> None:
    """IoU and colour errors on fill50k's testing pairs, for each sampling in CIRCLES_SWEEP.

    The row of the default sampling also holds the measures of each image.
    """
    tasks = real_tasks(config.fill50k)[: config.count]
    plan = [
        (
            _key(config, model, generation) | {"pairs": len(tasks)},
            functools.partial(
                measure_circles, model, tasks, generation, lines=generation == default
            ),
        )
        for generation in _varied(config, default, CIRCLES_SWEEP)
    ]
    measured_rows(*_file(config), plan, ("iou", "circle_error", "background_error", "seconds"))


def two_circles_study(
    config: Config, model: LatentDiffusion, default: ControlledGenerationConfig
) -> None:
    """Layouts with other seeds than in training, for each of SETS and SEEDS.

    Those of the kinds one_wide and two_wide are unlike the training data. Prints the table of all
    rows in the file.
    """
    plan = []
    for kind, wording in SETS:
        tasks = layout_tasks(kind, wording, config.count or LAYOUT_COUNT)
        for seed in SEEDS:
            generation = dataclasses.replace(default, seed=seed)
            key = {"kind": kind, "wording": wording, "layouts": len(tasks)} | _key(
                config, model, generation
            )
            plan.append((key, functools.partial(measure_several, model, tasks, generation)))
    columns = ("kind", "wording", "bound", "iou", "iou_each", "circle_error", "failed")
    print(binding(measured_rows(*_file(config), plan, columns)))


def canvas_study(
    config: Config, model: LatentDiffusion, default: ControlledGenerationConfig
) -> None:
    """Circles on a canvas of 4 x 4 model images: in patches, overlapping or not, and at once."""
    plan = []
    for part in STRIDES:
        stride = None if part is None else max(1, int(part * model.latent_side))
        key = {"stride": stride, "canvases": config.count or CANVAS_SEEDS} | _key(
            config, model, default
        )
        plan.append(
            (
                key,
                functools.partial(
                    measure_canvas, model, stride, config.count or CANVAS_SEEDS, default
                ),
            )
        )
    measured_rows(
        *_file(config), plan, ("stride", "iou", "circle_error", "background_error", "seconds")
    )


def autoencoder_study(
    config: Config, model: LatentDiffusion, default: ControlledGenerationConfig
) -> None:
    """Reconstructs fill50k's testing targets at the model's size with the autoencoder alone.

    Its IoU and colour errors are the best that an image from this model is expected to reach.
    """
    tasks = real_tasks(config.fill50k)[: config.count]
    images = torch.stack([resize(task.target, model.side, "area") for task in tasks])
    x = to_model_range(images).to(model.unet.device)
    again = torch.cat([model.decode(model.encode(part)) for part in x.split(16)]).clamp(-1.0, 1.0)
    each = [psnr(a[None], b[None]) for a, b in zip(x, again, strict=True)]
    measured = {}
    for name, pictures in (("resized", images), ("reconstructed", to_uint8(again).cpu())):
        lines = measure_tasks(
            tasks, torch.stack([resize(picture, SIZE) for picture in pictures]), model.side
        )
        measured[name] = means(lines)
    path, command = _file(config)
    result = {
        "model": shown(config.checkpoint),
        "pairs": len(tasks),
        "side": model.side,
        "psnr": psnr(x, again),
    }
    write_json(path, {"command": command, **result, "psnr_worst": min(each), **measured})
    print(
        f"PSNR at {model.side}x{model.side}: mean {result['psnr']:.1f} dB, lowest of"
        f" {len(tasks)} images {min(each):.1f} dB"
    )


def size_study(config: Config, model: LatentDiffusion, default: ControlledGenerationConfig) -> None:
    """Megabytes of all weights in float16, and the time of a picture on this machine.

    The time is the median over five drawings of the layouts of two circles, divided by their
    number.
    """
    tasks = layout_tasks("two", count=config.count or LAYOUT_COUNT)

    def measured() -> dict[str, Any]:
        seconds = []
        for _ in range(5):
            started = time.monotonic()
            draw_tasks(model, tasks, default)
            seconds.append(time.monotonic() - started)
        return {
            "megabytes": sum(param.numel() for param in model.parameters()) * 2e-6,
            "seconds_per_picture": median(seconds) / len(tasks),
            "threads": torch.get_num_threads(),
        }

    key = _key(config, model, default) | {"pictures": len(tasks)}
    measured_rows(*_file(config), [(key, measured)], ("megabytes", "seconds_per_picture"))


STUDIES = {
    "base": base_study,
    "autoencoder": autoencoder_study,
    "circles": circles_study,
    "two_circles": two_circles_study,
    "canvas": canvas_study,
    "size": size_study,
}


# ----------------------------------------------------------------------------
# Measures of images drawn with ControlNet.


def measure_circles(
    model: LatentDiffusion,
    tasks: Sequence[Task],
    generation: ControlledGenerationConfig,
    *,
    lines: bool,
) -> dict[str, Any]:
    """Draws the tasks; returns mean measures, evaluations per image and the seconds of drawing.

    The two halves of a guided pair are one evaluation; perturbed attention is a further one. With
    `lines`, the measures of each image are returned too, as "lines".
    """
    started = time.monotonic()
    pictures = draw_tasks(model, tasks, generation)
    seconds = time.monotonic() - started
    measured = measure_tasks(tasks, pictures, model.side)
    pairs = SPACINGS[generation.spacing](model.schedule, generation.steps)
    evaluations = count_evaluations(generation.sampler, model.schedule, pairs)
    if with_default_guidance(generation, model).pag_scale != 0.0:
        evaluations *= 2
    row = {"evaluations": evaluations, **means(measured), "seconds": seconds}
    return row | {"lines": measured} if lines else row


def measure_several(
    model: LatentDiffusion,
    tasks: Sequence[Task],
    generation: ControlledGenerationConfig,
) -> dict[str, Any]:
    """Draws tasks of several circles; returns mean measures, failures and the lines of all images.

    "bound" is the fraction of images with each circle in its own colour (within OWN_COLOUR), where
    the prompt names circles from left to right; "bound_any_order" also counts exchanged colours.
    "iou_each" is the mean IoU over single circles, "iou_worst" the lowest, "failed" the number of
    images with a failure.
    """
    lines = measure_tasks(tasks, draw_tasks(model, tasks, generation), model.side)
    for line in lines:
        line["failures"] = failures(line)
    each = [value for line in lines for value in line["iou_circles"]]
    failed = sum(bool(line["failures"]) for line in lines)
    return {
        **means(lines),
        "bound": fmean(max(line["own_errors"]) <= OWN_COLOUR for line in lines),
        "bound_any_order": fmean(max(line["circle_errors"]) <= OWN_COLOUR for line in lines),
        "iou_each": fmean(each),
        "iou_worst": min(each),
        "failed": failed,
        "lines": lines,
    }


# ----------------------------------------------------------------------------
# Keys and files of the rows.


def _varied(config: Config, default: ConfigT, changes: Sequence[dict[str, Any]]) -> list[ConfigT]:
    """The default with each of the changes, without duplicates; with --default-only the default."""
    if config.default_only:
        return [default]
    return list(dict.fromkeys(dataclasses.replace(default, **change) for change in changes))


def _key(config: Config, model: LatentDiffusion, generation: GenerationConfig) -> dict[str, Any]:
    """The key of a row: the model, a hash of its weights, and the sampling settings."""
    sampling = dataclasses.asdict(with_default_guidance(generation, model))
    del sampling["chunk_size"]  # changes no image by more than one grey level
    names = {"model": shown(config.checkpoint)}
    if isinstance(generation, ControlledGenerationConfig) and model.controlnet is not None:
        sampling["control_text"] = generation.control_text or model.controlnet.control_text
        small = kind_of(config.checkpoint) == "small"
        names["control"] = shown(
            config.control or (SHIPPED_CONTROL if small else config.checkpoint)
        )
    return {
        **names,
        WEIGHTS: state_hash(model),
        "sampling": sampling,
    }


def _file(config: Config) -> tuple[Path, str]:
    """The path of the study's result file, and the command that makes it."""
    data = " --fill50k hw2_data/fill50k" if config.fill50k else ""
    return (
        config.results / f"p3_controlnet_{config.study}.json",
        f"python3 -m p3_controlnet.study.sweeps {config.study}{data}",
    )


if __name__ == "__main__":
    cli.run(main, Config)
