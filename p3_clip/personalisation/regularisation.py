"""Regularisation pictures for Custom Diffusion: what the base model itself draws, so that training
does not make it forget."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, distributed

from common.images import read_rgb
from common.latent.generate import GenerationConfig, Request
from common.latent.model import LatentDiffusion
from common.latent.save_pictures import Picture, draw_missing
from common.seeds import derive_seed


class RegularizationImages(NamedTuple):
    """Regularisation pictures."""

    prompts: list[str]
    pictures: list[Tensor]
    """uint8 [3, S, S], one for each prompt."""


def regularization_images(
    model: LatentDiffusion, prompts: Sequence[str], folder: Path, config: GenerationConfig
) -> RegularizationImages:
    """A picture of the base model for each prompt, kept in `folder` by prompt and seed; equal
    prompts get different seeds."""
    seeds = [derive_seed(config.seed, number) for number in range(len(prompts))]
    wanted = [
        Picture(folder / f"{_name(prompt, seed)}.png", Request(prompt, seed))
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    draw_missing(model, wanted, config, model.side)
    if distributed.is_initialized():
        distributed.barrier()  # each process drew its share, and reads all
    return RegularizationImages(list(prompts), [read_rgb(picture.path) for picture in wanted])


def _name(prompt: str, seed: int) -> str:
    return hashlib.blake2b(json.dumps([prompt, seed]).encode(), digest_size=12).hexdigest()
