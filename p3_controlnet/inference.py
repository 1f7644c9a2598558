"""Draws the picture of every line of a prompt.json from its control image: OUT/<target>, 512x512
RGB.

    python3 -m p3_controlnet.inference --prompts prompt.json --sources source \
        --output-dir OUT --checkpoint checkpoints/ldm_shapes
    torchrun --nproc_per_node 2 -m p3_controlnet.inference ...    (the same files)

The checkpoint is a Stable Diffusion v1.4 file or folder, a ControlNet (its base then comes from
--base or $SD_BASE), or the folder of the small model. Finished pictures of the same settings are
kept, so an interrupted run goes on where it stopped.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from common import cli
from common.data.fill50k import SIZE, read_prompts
from common.devices import pick_device, this_process
from common.errors import InputError
from common.latent.control import residual_scales
from common.latent.generate import ControlledGenerationConfig, Request
from common.latent.model import LatentDiffusion
from common.latent.save_pictures import Picture, draw_missing
from p3_controlnet.hints import image_seed, read_hint, resize_hint
from p3_controlnet.loading import ModelConfig, load_model
from p3_controlnet.patches import patched


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
    """Work on overlapping patches of the model's own size, at this stride in latents; a larger
    --size is then a larger canvas."""
    generation: Annotated[ControlledGenerationConfig, tyro.conf.arg(name="")] = (
        ControlledGenerationConfig()
    )


def main(config: Config) -> None:
    """Writes the pictures, each process its share of the chunks."""
    config.generation.check()
    device = pick_device(config.model.device)
    pairs = read_prompts(config.prompts, config.sources, config.output_dir, targets_exist=False)
    hints = [
        read_hint(pair.source) for pair in pairs
    ]  # all before the first picture: a bad one is named at once
    model = load_model(config.model).to(device).eval()
    residual_scales(config.generation, model.controlnet.num_residuals)
    side = canvas(model, config)
    network = None
    if config.patch_stride is not None:
        network = patched(
            model.apply_model, model.latent_side, config.patch_stride, model.downscale
        )
    pictures = [
        Picture(
            pair.target,
            Request(
                pair.prompt,
                image_seed(
                    pair.target.relative_to(config.output_dir).as_posix(), config.generation.seed
                ),
                resize_hint(hint, side),
            ),
        )
        for pair, hint in zip(pairs, hints, strict=True)
    ]
    settings = {"patch_stride": config.patch_stride}
    latent_side = side // model.downscale
    draw_missing(
        model,
        pictures,
        config.generation,
        config.size,
        settings=settings,
        latent_side=latent_side,
        network=network,
    )
    if this_process().rank == 0:
        print(f"{len(pairs)} pictures in {config.output_dir}")


# ----------------------------------------------------------------------------
# Sizes and settings.


def canvas(model: LatentDiffusion, config: Config) -> int:
    """The side at which the model draws: its own, or in patch mode as many of its patches as `size`
    has of 512."""
    if config.size < 1:
        raise InputError(f"--size must be at least 1, not {config.size}")
    if config.patch_stride is None or config.size <= SIZE:
        return model.side
    return model.latent_side * config.size // SIZE * model.downscale


if __name__ == "__main__":
    cli.run(main, Config)
