"""Draws the picture of every line of a prompt.json from its control image: OUT/<target>, 512x512 RGB.

    python3 -m p3_controlnet.inference --prompts prompt.json --sources source --output-dir OUT --checkpoint checkpoints/ldm_shapes
    torchrun --nproc_per_node 2 -m p3_controlnet.inference ...    (the same files)

The checkpoint is a Stable Diffusion v1.4 file or folder, a ControlNet (its base then comes from --base or $SD_BASE), or the folder of
the small model. Finished pictures of the same settings are kept, so an interrupted run goes on where it stopped.
"""

import dataclasses
import os
import zlib
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from common import cli
from common.data.fill50k import SIZE, read_prompts
from common.devices import DeviceName, pick_device
from common.errors import InputError
from common.files import ROOT
from common.images import read_rgb
from common.latent.generate import GenerationConfig, Request, check_generation, residual_scales
from common.latent.load import holds_base, kind_of, load_base
from common.latent.model import LatentDiffusion
from common.latent.save_pictures import Picture, draw_missing
from common.seeds import derive_seed
from p3_controlnet.formats import is_small, load_controlnet
from p3_controlnet.patches import patched

SHIPPED_BASE, SHIPPED_CONTROL = ROOT / "checkpoints" / "ldm_shapes", ROOT / "checkpoints" / "controlnet_circles"
SD_CONTROL = ROOT / "checkpoints" / "controlnet_sd14"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which base model and which ControlNet to draw with, and where."""

    checkpoint: Path = SHIPPED_BASE
    """Stable Diffusion v1.4 file or folder, ControlNet file or folder, or the folder of the small model."""
    base: Path | None = None
    """The base of a ControlNet given as checkpoint; the default is $SD_BASE, for a small one the shipped small model."""
    control: Path | None = None
    """The ControlNet of a base given as checkpoint; the default is the shipped one."""
    device: DeviceName = "auto"
    """Where to compute; auto takes CUDA if present."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Draws the picture of every line of a prompt.json from its control image."""

    prompts: Path
    """prompt.json: lines with source, target and prompt."""
    sources: Path
    """Folder of the control images."""
    output_dir: Path
    """Folder of the pictures."""
    model: Annotated[ModelConfig, tyro.conf.arg(name="")] = ModelConfig()
    size: int = SIZE
    """Side of the pictures that are written."""
    patch_stride: int | None = None
    """Work on overlapping patches of the model's own size, at this stride in latents; a larger --size is then a larger canvas."""
    generation: Annotated[GenerationConfig, tyro.conf.arg(name="")] = GenerationConfig()


def main(config: Config) -> None:
    """Writes the pictures, each process its share of the chunks."""
    check_generation(config.generation)
    device = pick_device(config.model.device)
    pairs = read_prompts(config.prompts, config.sources, config.output_dir, targets_exist=False)
    hints = [read_hint(pair.source) for pair in pairs]  # all before the first picture: a bad one is named at once
    model = load_model(config.model).to(device).eval()
    residual_scales(config.generation, model.controlnet.num_residuals)
    side = canvas(model, config)
    network = None
    if config.patch_stride is not None:
        network = patched(model.apply_model, model.latent_side, config.patch_stride, model.downscale)
    pictures = [
        Picture(
            pair.target,
            Request(
                pair.prompt,
                image_seed(pair.target.relative_to(config.output_dir).as_posix(), config.generation.seed),
                resize_hint(hint, side),
            ),
        )
        for pair, hint in zip(pairs, hints, strict=True)
    ]
    settings = {"patch_stride": config.patch_stride}
    latent_side = side // model.downscale
    draw_missing(
        model, pictures, config.generation, config.size, settings=settings, latent_side=latent_side, network=network
    )
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{len(pairs)} pictures in {config.output_dir}")


# ----------------------------------------------------------------------------
# Which model.


def load_model(config: ModelConfig) -> LatentDiffusion:
    """The base and the ControlNet that the checkpoint stands for. Raises InputError if it is of no known kind."""
    checkpoint = config.checkpoint
    _check_shipped(checkpoint)
    kind = kind_of(checkpoint)
    if kind == "unknown":
        raise InputError(
            f"{checkpoint} is no Stable Diffusion v1.4, no ControlNet and no model folder of this project: nothing to draw with"
        )
    if kind == "controlnet":
        if config.control:
            raise InputError(f"{checkpoint} is a ControlNet itself, so --control {config.control} has no place")
        return with_control(find_base(checkpoint, config.base), checkpoint)
    if config.base:
        raise InputError(f"{checkpoint} is a base model itself, so --base {config.base} has no place")
    if kind == "small":
        return with_control(checkpoint, config.control or SHIPPED_CONTROL)
    if config.control or SD_CONTROL.is_dir():
        return with_control(checkpoint, config.control or SD_CONTROL)
    print(
        f"there is no ControlNet for Stable Diffusion in checkpoints/{SD_CONTROL.name}, so the pictures are drawn by the "
        f"project's small model, checkpoints/{SHIPPED_BASE.name} with checkpoints/{SHIPPED_CONTROL.name}"
    )
    return with_control(SHIPPED_BASE, SHIPPED_CONTROL)


def find_base(control: Path, base: Path | None) -> Path:
    """The base of a ControlNet: the one given, the file itself if it holds one, $SD_BASE, or for a small one the small model."""
    if base is not None:
        return base
    if control.is_dir() and is_small(control):
        return SHIPPED_BASE
    if holds_base(control):
        return control
    if given := os.environ.get("SD_BASE"):
        return Path(given)
    raise InputError(
        f"{control} is a ControlNet, which needs the Stable Diffusion v1.4 that it was trained on: "
        "name it with --base or in the environment variable SD_BASE"
    )


def with_control(base: Path, control: Path) -> LatentDiffusion:
    """A base model with a ControlNet in its slot."""
    for path in (base, control):
        _check_shipped(path)
    model = load_base(base)
    model.controlnet = load_controlnet(control, model.unet)
    return model


def _check_shipped(path: Path) -> None:
    if path.resolve() in (SHIPPED_BASE, SHIPPED_CONTROL) and not path.is_dir():
        raise InputError(f"checkpoints/{path.name} is not there: no weights of the small model are shipped yet")


# ----------------------------------------------------------------------------
# Sizes and settings.


def canvas(model: LatentDiffusion, config: Config) -> int:
    """The side at which the model draws: its own, or in patch mode as many of its patches as `size` has of 512."""
    if config.size < 1:
        raise InputError(f"--size must be at least 1, not {config.size}")
    if config.patch_stride is None or config.size <= SIZE:
        return model.side
    return model.latent_side * config.size // SIZE * model.downscale


def read_hint(path: Path) -> Tensor:
    """A control image, uint8 [3, S, S]; grey ones are read as RGB. Raises InputError if it is missing or not square."""
    hint = read_rgb(path)
    if hint.shape[1] != hint.shape[2]:
        raise InputError(f"the control image {path} has {hint.shape[2]}x{hint.shape[1]} pixels, but must be square")
    return hint


def resize_hint(hint: Tensor, side: int) -> Tensor:
    """uint8 [3, S, S] at another side: averaged over areas, which keeps the place of a thin line, or bilinear."""
    if hint.shape[-1] == side:
        return hint
    mode = {"mode": "area"} if side < hint.shape[-1] else {"mode": "bilinear", "align_corners": False}
    return F.interpolate(hint[None].float(), (side, side), **mode)[0].round().to(torch.uint8)


def image_seed(name: str, seed: int) -> int:
    """The seed of one picture, from the run's seed and the picture's own name, with or without fill50k's folder."""
    return derive_seed(seed, zlib.crc32(name.removeprefix("target/").encode()))


if __name__ == "__main__":
    cli.run(main, Config)
