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
import functools
import os
from pathlib import Path
from typing import Annotated

import tyro
from torch import Tensor

from common import cli
from common.config import Side, Size
from common.data.fill50k import SIZE, Pair, read_prompts
from common.devices import exact_kernels, pick_device, this_process
from common.latent.control import residual_scales
from common.latent.generate import ControlledGenerationConfig, Request
from common.latent.model import LatentDiffusion
from common.latent.save_pictures import Mapped, Picture, draw_missing
from p3_controlnet.hints import image_seed, read_hint, resize_hint
from p3_controlnet.loading import ModelConfig, load_model
from p3_controlnet.patches import patched


@dataclasses.dataclass(frozen=True)
class Config:
    """Draws one image for each line of a prompt.json, from its prompt and its control image."""

    prompts: Path
    """prompt.json: one JSON object on each line, or one array of them, with the keys source, target
    and prompt."""
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
    model = load_model(config.model).to(device).eval()
    residual_scales(config.generation, model.controlnet.num_residuals)  # checks their number
    side = canvas(model, config)
    network = None
    if config.patch_stride is not None:
        network = patched(
            model.apply_model, model.latent_side, config.patch_stride, model.downscale
        )

    # A control image is read when its turn comes, since thousands do not fit into memory, and kept
    # until its chunk is written.
    @functools.lru_cache(maxsize=config.generation.chunk_size)
    def read(path: str) -> Tensor:
        return resize_hint(read_hint(Path(path)), side)

    # A job may have hundreds of thousands of pictures: what takes time is left for their turn.
    def picture(pair: Pair) -> Picture:
        name = pair.target_path.removeprefix(os.path.join(config.output_dir, ""))
        seed = functools.partial(image_seed, name, config.generation.seed)
        hint = functools.partial(read, pair.source_path)
        return Picture(pair.target_path, Request(pair.prompt, seed, hint))

    settings = {"patch_stride": config.patch_stride}
    latent_side = side // model.downscale
    with exact_kernels(config.model.precision == "fp32"):
        draw_missing(
            model,
            Mapped(picture, pairs),
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
