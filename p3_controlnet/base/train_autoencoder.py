"""Trains the autoencoder of the small latent-diffusion model.

    python3 -m p3_controlnet.base.train_autoencoder --run-dir runs/ldm_autoencoder --fill50k hw2_data/fill50k

The same command again resumes. RUN_DIR/last is a diffusers AutoencoderKL folder whose latents have mean 0 and variance 1.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from common import cli
from common.data.examples import drawn_examples, real_examples
from common.errors import InputError
from common.grid import labelled_grid
from common.images import to_model_range, to_uint8, write_png
from common.seeds import ImageGenerators, derive_seed
from common.small_diffusion import (
    SIDE,
    AutoencoderConfig,
    build_autoencoder,
    load_network,
    psnr,
    save_network,
    with_normal_latents,
)
from common.training import Batch, TrainingConfig, fit, settings_of

VALIDATION_SEED, VALIDATION_IMAGES = 1, 256
MEASURED_IMAGES = 512  # for the latents' mean and variance
PREVIEW_IMAGES = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains the autoencoder of the small latent-diffusion model."""

    run_dir: Path
    """Folder of the run: checkpoints, metrics, previews."""
    fill50k: Path | None = None
    """Real pairs to mix in, in the homework's layout; None for drawn pictures alone."""
    init_from: Path | None = None
    """Autoencoder folder to start from, instead of random weights."""
    pictures: int = 20_000
    """Drawn pictures."""
    kl_weight: float = 1e-4
    """Weight of the latents' mean KL divergence from a standard normal, for each element."""
    model: AutoencoderConfig = AutoencoderConfig()
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = TrainingConfig(
        steps=5000, batch_size=16, lr=1e-3, warmup=100, weight_decay=0.0, validate_every=500, preview_every=1000
    )


def main(config: Config) -> None:
    """Trains, or resumes."""
    from diffusers import AutoencoderKL

    if config.pictures < 1:
        raise InputError(f"--pictures must be at least 1, not {config.pictures}")
    torch.manual_seed(config.training.seed)
    model = load_network(config.init_from, AutoencoderKL) if config.init_from else build_autoencoder(config.model)
    model.train()
    images = drawn_examples(config.pictures, SIDE, config.training.seed).images
    if config.fill50k:
        images = torch.cat([images, real_examples(config.fill50k, SIDE).images])
    held_out = drawn_examples(VALIDATION_IMAGES, SIDE, VALIDATION_SEED + config.training.seed).images

    def draw(step: int) -> Batch:
        generator = torch.Generator().manual_seed(derive_seed(config.training.seed, step, 1))
        index = torch.randint(len(images), (config.training.batch_size,), generator=generator)
        return {"index": index, "image": images[index]}

    def loss_fn(batch: Batch, generators: ImageGenerators) -> Tensor:
        x = to_model_range(batch["image"])
        posterior = model.encode(x).latent_dist
        z = posterior.mean + posterior.std * generators.randn(*posterior.mean.shape[1:])
        reconstruction = (model.decode(z).sample - x).square().mean()
        # The divergence of one element from a standard normal (Appendix B of Kingma and Welling 2013, arXiv:1312.6114).
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
        return reconstruction + config.kl_weight * divergence

    @torch.no_grad()
    def reconstruct(pictures: Tensor) -> Tensor:
        device = next(model.parameters()).device
        parts = (to_model_range(part).to(device) for part in pictures.split(64))
        return torch.cat([model.decode(model.encode(x).latent_dist.mean).sample.cpu() for x in parts])

    def validate() -> dict[str, float]:
        value = psnr(reconstruct(held_out).clamp(-1.0, 1.0), to_model_range(held_out))
        return {"loss": -value, "psnr": value}

    def preview(path: Path) -> None:
        pictures = held_out[:PREVIEW_IMAGES]
        both = torch.stack([pictures, to_uint8(reconstruct(pictures))], 1).flatten(0, 1)
        write_png(path, labelled_grid(both, columns=8, scale=2))

    def save(folder: Path) -> None:
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:MEASURED_IMAGES]
        measured = to_model_range(images[chosen]).to(next(model.parameters()).device)
        save_network(folder, with_normal_latents(model, measured), torch.float16)

    fit(
        dict(model.named_parameters()),
        loss_fn,
        draw,
        config.training,
        config.run_dir,
        settings=settings_of(config, fill50k=bool(config.fill50k)),
        save=save,
        validate=validate,
        preview=preview,
    )


if __name__ == "__main__":
    cli.run(main, Config)
