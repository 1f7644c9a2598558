"""Draws the frames of the report page's sliders with the shipped models.

    # all sliders, a few minutes on two CPU cores; run again after a change of a model
    python3 -m scripts.make_frames
    # some of them
    python3 -m scripts.make_frames --only p2_eta p2_interpolation

results/frames/NAME.webp holds the frames of a slider below each other, NAME.json what they show.
`<!-- frames: NAME -->` in docs/report.md places the slider in report.html (scripts/make_report.py).
No data is needed: seeds are fixed, and control images are drawn.
"""

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from common import cli
from common.data.digits import NUM_DIGITS, pairing
from common.data.examples import circle_scenes
from common.diffusion.interpolation import lerp, slerp
from common.diffusion.samplers import SAMPLERS
from common.files import ROOT, atomic_write, make_folder, shown, write_json
from common.grid import labelled_grid
from common.images import to_pil, to_uint8
from common.latent.generate import ControlledGenerationConfig
from common.latent.model import LatentDiffusion
from p1_diffusion import sampling as p1
from p1_diffusion.model import ContextUNet
from p2_ddim import sampling as p2
from p2_ddim.model import FACES, FaceNetwork, load_network
from p3_controlnet.hints import resize_hint
from p3_controlnet.loading import ModelConfig, load_model
from p3_controlnet.study.tasks import Task, draw_tasks, layout_tasks, scene_tasks

Name = Literal[
    "p1_reverse",
    "p1_guidance",
    "p1_steps",
    "p2_eta",
    "p2_interpolation",
    "p2_steps",
    "p3_control_scale",
    "p3_control_image",
    "p3_without_control",
]
NAMES: tuple[Name, ...] = get_args(Name)
FEW_STEPS = ("dpmpp_2m", "ddim")
FACES_SHOWN = 6
CIRCLES_SEED = 2025  # the training's seed is 0, its validation's 1
SHOWN = 256  # side of ControlNet's pictures in the frames, in pixels


@dataclasses.dataclass(frozen=True)
class Config:
    """Draws the frames of the report page's sliders with the shipped models."""

    only: tuple[Name, ...] = NAMES
    """Sliders to draw; all by default."""
    output_dir: Path = ROOT / "results" / "frames"
    """Folder of NAME.webp and NAME.json."""


@dataclasses.dataclass(frozen=True)
class Frames:
    """The frames of a slider, or of a before-and-after comparison."""

    label: str
    """Quantity that the slider changes."""
    values: tuple[str, ...]
    """Text of each position."""
    pictures: Tensor
    """Frames, uint8 [K, 3, H, W], one for each value; two for each in a comparison."""
    caption: str
    """What the frames show and with which settings."""
    start: int = 0
    """Index of the value that is shown first."""
    sides: tuple[str, str] | None = None
    """Names of the two pictures of each value in a comparison, else None."""


def main(config: Config) -> None:
    """Draws the chosen sliders and writes their files."""
    folder = make_folder(config.output_dir)
    for name in config.only:
        save(folder / name, DRAW[name]())
        print(shown(folder / f"{name}.webp"), flush=True)


def save(path: Path, frames: Frames) -> None:
    """Writes PATH.webp, the frames below each other, and PATH.json."""
    count, _, height, width = frames.pictures.shape
    strip = frames.pictures.permute(1, 0, 2, 3).reshape(3, count * height, width)
    buffer = io.BytesIO()
    to_pil(strip).save(buffer, "WEBP", quality=80, method=6)
    atomic_write(path.with_suffix(".webp"), buffer.getvalue())
    about = {
        "command": f"python3 -m scripts.make_frames --only {path.name}",
        "label": frames.label,
        "values": list(frames.values),
        "start": frames.start,
        "sides": list(frames.sides) if frames.sides else None,
        "caption": frames.caption,
        "width": width,
        "height": height,
    }
    write_json(path.with_suffix(".json"), about)


# ----------------------------------------------------------------------------
# Problem 1: rows of the ten digits, image 1 of each.

ROWS = {"MNIST-M": "mnistm", "SVHN": "svhn"}


def digit_rows(model: ContextUNet, sampling: p1.SamplingConfig) -> Tensor:
    """The digits 0 to 9 of MNIST-M, then of SVHN, uint8 [20, 3, 28, 28]."""
    keys = p1.class_keys(pairing("2024"), 1)
    sampling = dataclasses.replace(sampling, chunk_size=len(keys))
    return torch.cat([images for _, images in p1.sample_digits(model, keys, sampling)])


def digit_frame(parts: dict[str, Tensor]) -> Tensor:
    """A grid of the rows of digits of each part, labelled "DATASET, PART"."""
    labels = [f"{dataset}\n{part}" for part in parts for dataset in ROWS]
    return labelled_grid(torch.cat([*parts.values()]), NUM_DIGITS, row_labels=labels, scale=2)


def guidance(
    model: ContextUNet, weights: Sequence[float] = (0, 0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6.5, 8)
) -> Frames:
    """The same noises with growing guidance, at every timestep and in the default interval."""
    default = p1.SamplingConfig()
    intervals = {"all t": (0, 999), "t = {}..{}".format(*default.guidance_interval): None}
    frames = [
        digit_frame(
            {
                label: digit_rows(
                    model,
                    dataclasses.replace(
                        default,
                        guidance_scale=weight + 1.0,
                        guidance_interval=interval or default.guidance_interval,
                    ),
                )
                for label, interval in intervals.items()
            }
        )
        for weight in weights
    ]
    caption = (
        "Digits from the same noises as guidance grows; in the upper rows it acts at every"
        " timestep, in the lower ones in the default interval."
        f" {SAMPLERS[default.sampler].label}, {default.steps} steps, seed {default.seed}."
    )
    values = tuple(f"{weight:g}" for weight in weights)
    return Frames("guidance w", values, torch.stack(frames), caption)


def digit_steps(
    model: ContextUNet, steps: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50)
) -> Frames:
    """The same noises with growing numbers of steps, by two samplers."""
    default = p1.SamplingConfig()
    frames = [
        digit_frame(
            {
                SAMPLERS[sampler].label: digit_rows(
                    model, dataclasses.replace(default, sampler=sampler, steps=count)
                )
                for sampler in FEW_STEPS
            }
        )
        for count in steps
    ]
    caption = (
        "Digits from the same noises with more and more steps (evaluations of the network); the"
        f" default guidance, seed {default.seed}."
    )
    return Frames("steps", tuple(map(str, steps)), torch.stack(frames), caption)


def digit_reverse(model: ContextUNet) -> Frames:
    """x_t and the predicted x0 at each step, digits of the 2025 edition."""
    keys = sorted(((*pair, 1) for pair in pairing("2025")), key=lambda key: key[1])
    states: list[tuple[int, Tensor, Tensor]] = []
    sampling = p1.SamplingConfig(chunk_size=len(keys))
    chunks = p1.sample_digits(
        model,
        keys,
        sampling,
        callback=lambda i, t, x_t, x0: states.append((t, x_t.clone(), x0.clone())),
    )
    final = torch.cat([images for _, images in chunks])
    pairs = [(to_uint8(x_t), to_uint8(x0)) for _, x_t, x0 in states] + [(final, final)]
    frames = [
        labelled_grid(torch.cat(pair), NUM_DIGITS, row_labels=["x_t", "predicted\nx0"], scale=2)
        for pair in pairs
    ]
    caption = (
        "The reverse process of ten digits: the noisy image above, what the network takes it for"
        f" below. {SAMPLERS[sampling.sampler].label}, {sampling.steps} steps, seed {sampling.seed}."
    )
    values = (*(str(t) for t, _, _ in states), "image")
    return Frames("t", values, torch.stack(frames), caption, start=len(frames) // 2)


# ----------------------------------------------------------------------------
# Problem 2: faces from the noises of scripts/make_noise.py.


def face_noises(count: int, side: int = 64) -> list[p2.NamedNoise]:
    """The first noises that `scripts.make_noise` writes."""
    return [(f"{n:02d}", p2.numbered_noise(n, side)) for n in range(count)]


def face_images(
    network: FaceNetwork, noises: Sequence[p2.NamedNoise], sampling: p2.SamplingConfig
) -> Tensor:
    """A stretched face for each noise, as hw2_2.sh's: uint8 [N, 3, 64, 64]."""
    sampling = dataclasses.replace(sampling, chunk_size=len(noises))
    return p2.minmax_to_uint8(
        torch.cat([x0 for _, x0 in p2.sample_faces(network, noises, sampling)])
    )


def face_eta(
    network: FaceNetwork, etas: Sequence[float] = tuple(i / 10 for i in range(11))
) -> Frames:
    """The same noises with growing eta."""
    noises, default = face_noises(FACES_SHOWN), p2.SamplingConfig()
    frames = [
        labelled_grid(
            face_images(network, noises, dataclasses.replace(default, eta=eta)),
            FACES_SHOWN,
            column_labels=[name for name, _ in noises],
            scale=2,
        )
        for eta in etas
    ]
    caption = (
        "Faces from the same noises as eta grows from DDIM (0) to DDPM's variance (1); the fresh"
        f" noise is the same but for its strength. {default.steps} steps, seed {default.seed}."
    )
    return Frames("eta", tuple(f"{eta:g}" for eta in etas), torch.stack(frames), caption)


def face_interpolation(
    network: FaceNetwork,
    alphas: Sequence[float] = tuple(i / 20 for i in range(21)),
    side: int = 64,
) -> Frames:
    """Three pairs of noises, interpolated by slerp and by lerp."""
    noises, default = face_noises(FACES_SHOWN, side), p2.SamplingConfig()
    pairs = list(zip(noises[::2], noises[1::2], strict=True))
    frames = []
    for alpha in alphas:
        mixed = [
            (f"{start[0]} to {end[0]}", path(start[1], end[1], alpha))
            for path in (slerp, lerp)
            for start, end in pairs
        ]
        frames.append(
            labelled_grid(
                face_images(network, mixed, default),
                len(pairs),
                row_labels=[
                    f"{path}\n|x| / sqrt(d)\n{row[0][1].square().mean().sqrt():.2f}"
                    for path, row in (("slerp", mixed), ("lerp", mixed[len(pairs) :]))
                ],
                column_labels=[name for name, _ in mixed[: len(pairs)]],
                scale=2,
            )
        )
    caption = (
        "Three pairs of noises: the great circle (slerp) above, the straight line (lerp) below,"
        f" with the norm of the first mixture. {default.steps} steps."
    )
    values = tuple(f"{alpha:.2f}" for alpha in alphas)
    return Frames("alpha", values, torch.stack(frames), caption, start=len(alphas) // 2)


def face_steps(
    network: FaceNetwork, steps: Sequence[int] = (2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 100)
) -> Frames:
    """The same noises with growing numbers of steps, by two samplers."""
    noises, default = face_noises(FACES_SHOWN), p2.SamplingConfig()
    frames = [
        labelled_grid(
            torch.cat(
                [
                    face_images(
                        network,
                        noises,
                        dataclasses.replace(default, sampler=sampler, steps=count),
                    )
                    for sampler in FEW_STEPS
                ]
            ),
            FACES_SHOWN,
            row_labels=[SAMPLERS[sampler].label.replace("(", "\n(") for sampler in FEW_STEPS],
            scale=2,
        )
        for count in steps
    ]
    caption = (
        "Faces from the same noises with more and more steps (evaluations of the network), in the"
        " homework's spacing; each image is stretched to its own range, as the homework's are."
    )
    return Frames("steps", tuple(map(str, steps)), torch.stack(frames), caption)


# ----------------------------------------------------------------------------
# Problem 3, 2025: circles by ControlNet, one and two in a picture.


def control_tasks() -> list[Task]:
    """Four drawn control images of one circle, then two of two circles in two colours."""
    return scene_tasks(circle_scenes(4, CIRCLES_SEED), "drawn") + layout_tasks("two", count=2)


def control_images(model: LatentDiffusion, tasks: Sequence[Task], scale: float) -> Tensor:
    """The tasks' pictures with a control scale, uint8 [N, 3, SHOWN, SHOWN]."""
    generation = ControlledGenerationConfig(control_scales=(scale,), chunk_size=len(tasks))
    return _small(draw_tasks(model, tasks, generation))


def control_scale(
    model: LatentDiffusion, scales: Sequence[float] = tuple(i / 8 for i in range(13))
) -> Frames:
    """The control images, and the same noises with growing control."""
    tasks = control_tasks()[:4]
    hints = _small(torch.stack([task.source for task in tasks]))
    frames = [
        labelled_grid(
            torch.cat([hints, control_images(model, tasks, scale)]),
            len(tasks),
            row_labels=["control", "result"],
        )
        for scale in scales
    ]
    caption = (
        "Control images above, pictures from the same noises below, as the control scale grows: "
        + "; ".join(task.prompt for task in tasks)
        + "."
    )
    values = tuple(f"{scale:g}" for scale in scales)
    return Frames("control scale", values, torch.stack(frames), caption)


def control_image(model: LatentDiffusion) -> Frames:
    """Control image against result."""
    tasks = control_tasks()
    before = _small(torch.stack([task.source for task in tasks]))
    caption = "Control image against result. The last two have two circles in two colours."
    return _comparison(
        tasks, before, control_images(model, tasks, 1.0), ("control image", "result"), caption
    )


def without_control(model: LatentDiffusion) -> Frames:
    """The base model against the base model with ControlNet, from the same noise and prompt, both
    without perturbed attention."""
    tasks = control_tasks()
    before, after = (control_images(model, tasks, scale) for scale in (0.0, 1.0))
    caption = "The same prompt and noise: the base model alone against the base with ControlNet."
    return _comparison(tasks, before, after, ("without control", "with control"), caption)


def _comparison(
    tasks: Sequence[Task], before: Tensor, after: Tensor, sides: tuple[str, str], caption: str
) -> Frames:
    pictures = torch.stack([before, after], dim=1).flatten(0, 1)
    return Frames("prompt", tuple(task.prompt for task in tasks), pictures, caption, sides=sides)


def _small(pictures: Tensor) -> Tensor:
    return torch.stack([resize_hint(picture, SHOWN) for picture in pictures])


def _digits() -> ContextUNet:
    return ContextUNet.load(ROOT / "checkpoints" / "p1_digits")


def _faces() -> FaceNetwork:
    return load_network(FACES)


def _circles() -> LatentDiffusion:
    return load_model(ModelConfig()).eval()


DRAW: dict[Name, Callable[[], Frames]] = {
    "p1_reverse": lambda: digit_reverse(_digits()),
    "p1_guidance": lambda: guidance(_digits()),
    "p1_steps": lambda: digit_steps(_digits()),
    "p2_eta": lambda: face_eta(_faces()),
    "p2_interpolation": lambda: face_interpolation(_faces()),
    "p2_steps": lambda: face_steps(_faces()),
    "p3_control_scale": lambda: control_scale(_circles()),
    "p3_control_image": lambda: control_image(_circles()),
    "p3_without_control": lambda: without_control(_circles()),
}


if __name__ == "__main__":
    cli.run(main, Config)
