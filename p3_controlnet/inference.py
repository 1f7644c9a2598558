"""Draws one image for each line of a prompt.json: OUT/<target>, RGB, by default 512x512 pixels.

    python3 -m p3_controlnet.inference --prompts prompt.json --sources source \
        --output-dir OUT --checkpoint checkpoints/ldm_shapes
    # the same files from two processes
    torchrun --nproc_per_node 2 -m p3_controlnet.inference ...

The checkpoint is a Stable Diffusion v1.4 file or folder, a ControlNet (whose base is then named by
--base or $SD_BASE), or the folder of the small model. Complete images from the same settings are
kept, so repeating an interrupted command finishes it.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from common import cli
from common.config import Side, Size
from common.data.fill50k import SIZE, read_prompts
from common.devices import pick_device, this_process
from common.latent.control import residual_scales
from common.latent.generate import ControlledGenerationConfig, Request
from common.latent.model import LatentDiffusion
from common.latent.save_pictures import Picture, draw_missing
from p3_controlnet.hints import image_seed, read_hint, resize_hint
from p3_controlnet.loading import ModelConfig, load_model
from p3_controlnet.patches import patched


@dataclasses.dataclass(frozen=True)
class Config:
    """Draws one image for each line of a prompt.json, from its prompt and its control image."""

    prompts: Path
    """prompt.json: one JSON object per line, with the keys source, target and prompt."""
    sources: Path
    """Folder of the control images, which `source` names."""
    output_dir: Path
    """Folder for the drawn images, which `target` names."""
    model: Annotated[ModelConfig, tyro.conf.arg(name="")] = ModelConfig()
    size: Side = SIZE
    """Side of the written images, in pixels."""
    patch_stride: Size | None = None
    """Stride, in latents, of overlapping patches of the model's own size. With it, a --size above
    512 is drawn on a larger canvas; by default every image is drawn at the model's own size and
    then resized."""
    generation: Annotated[ControlledGenerationConfig, tyro.conf.arg(name="")] = (
        ControlledGenerationConfig()
    )


def main(config: Config) -> None:
    """Writes the images; each process draws its share of the chunks."""
    config.generation.check()
    device = pick_device(config.model.device)
    pairs = read_prompts(config.prompts, config.sources, config.output_dir, targets_exist=False)
    # All control images are read first, so that a bad one is reported before any image is drawn.
    hints = [read_hint(pair.source) for pair in pairs]
    model = load_model(config.model).to(device).eval()
    residual_scales(config.generation, model.controlnet.num_residuals)  # checks their number
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
    """Side of the images that the model draws, in pixels, before they are resized to `size`.

    It is the model's own side, or, with a patch stride and a `size` above 512, `size` / 512 times
    that, rounded down to whole latents.
    """
    if config.patch_stride is None or config.size <= SIZE:
        return model.side
    return model.latent_side * config.size // SIZE * model.downscale


if __name__ == "__main__":
    cli.run(main, Config)
