"""Trains the autoencoder of the small latent-diffusion model.

    python3 -m p3_controlnet.base.train_autoencoder --run-dir runs/ldm_autoencoder \
        --fill50k hw2_data/fill50k

Running the same command again resumes. RUN_DIR/last is a diffusers AutoencoderDC folder.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
import tyro
from torch import Tensor

from common import cli
from common.checkpoint import tensors_hash
from common.cli import Preset
from common.config import NonNegative, Pictures
from common.data.examples import RealPairs, drawn_examples, in_memory
from common.errors import InputError
from common.grid import labelled_grid
from common.images import to_model_range, to_uint8, write_png
from common.latent.small import (
    AutoencoderConfig,
    build_autoencoder,
    load_network,
    psnr,
    save_network,
    side_of,
)
from common.seeds import Draws, random_indices
from common.training import (
    Batch,
    TrainingConfig,
    check_sizes_of_start,
    fit,
    new_network,
    refuse_compile,
    settings_of,
)

if TYPE_CHECKING:
    from diffusers import AutoencoderDC

VALIDATION_SEED, VALIDATION_IMAGES = 1, 256
PREVIEW_IMAGES = 16


TRAINING = TrainingConfig(
    steps=3000,
    batch_size=16,
    optimizer="muon",
    lr=5e-3,
    lr_schedule="constant",
    warmup=200,
    weight_decay=0.0,
    validate_every=500,
    preview_every=1000,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains the autoencoder of the small latent-diffusion model."""

    run_dir: Path
    """Folder of the run: checkpoints, metrics, previews."""
    fill50k: Path | None = None
    """Folder of fill50k, in the homework's layout, whose training images are added to the drawn
    ones; None for drawn images only."""
    init_from: Path | None = None
    """Autoencoder folder to start from, instead of random weights."""
    pictures: Pictures = 20_000
    """Number of drawn training images."""
    kl_weight: NonNegative = 1e-4
    """Weight of the KL divergence of the posterior from a standard normal, the mean over all
    elements of the latents."""
    posterior_std: NonNegative = 0.1
    """Standard deviation of the posterior, the same for all elements: in training, the decoder gets
    latents with noise of this size."""
    model: AutoencoderConfig = AutoencoderConfig()
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = TRAINING
    PRESETS: ClassVar = {
        "small": Preset(
            "the defaults: about an hour on one CPU core; expect a PSNR of 40 dB on images of"
            " fill50k",
            {},
        ),
        "smoke": Preset(
            "tests the installation: two steps, about half a minute on a CPU;"
            " expect a held-out PSNR of about 12 dB",
            {
                "pictures": 64,
                "training": dataclasses.replace(
                    TRAINING, steps=2, batch_size=4, warmup=1, log_every=1
                ),
            },
        ),
    }


def main(config: Config) -> None:
    """Trains from the start, or resumes the run in `config.run_dir`."""
    refuse_compile(config.training)
    torch.manual_seed(config.training.seed)
    if config.init_from:
        model = _start(config.init_from, config.model)
    else:
        model = new_network(lambda: build_autoencoder(config.model), check_sizes)
    model.train()
    side, seed = side_of(model), config.training.seed
    images = drawn_examples(config.pictures, side, seed).images
    if config.fill50k:
        images = torch.cat([images, in_memory(RealPairs(config.fill50k, side, hints=False)).images])
    held_out = drawn_examples(VALIDATION_IMAGES, side, VALIDATION_SEED + seed).images

    def get_batch(step: int, generator: torch.Generator) -> Batch:
        own = torch.Generator().manual_seed(generator.initial_seed())  # the data are on the CPU
        index = random_indices(len(images), config.training.batch_size, own)
        return {"index": index, "image": images[index]}

    def loss_fn(batch: Batch, draws: Draws) -> Tensor:
        x = to_model_range(batch["image"])
        mean = model.encode(x).latent
        z = mean + config.posterior_std * draws.randn(*mean.shape[1:])
        reconstruction = (model.decode(z).sample - x).square().mean()
        # KL divergence of N(mean, std^2) from a standard normal (Appendix B of Kingma and Welling
        # 2013, arXiv:1312.6114). The terms in std alone are constant and left out.
        return reconstruction + config.kl_weight * 0.5 * mean.square().mean()

    @torch.no_grad()
    def reconstruct(pictures: Tensor) -> Tensor:
        """Reconstructions float32 [N, 3, H, W] in about [-1, 1] of images uint8 [N, 3, H, W]."""
        device = next(model.parameters()).device
        parts = (to_model_range(part).to(device) for part in pictures.split(64))
        return torch.cat([model.decode(model.encode(x).latent).sample.cpu() for x in parts])

    def validate() -> dict[str, float]:
        """PSNR in dB on held-out drawn images; "loss", its negative, chooses RUN_DIR/best."""
        value = psnr(reconstruct(held_out).clamp(-1.0, 1.0), to_model_range(held_out))
        return {"loss": -value, "psnr": value}

    def preview(path: Path) -> None:
        """Writes a grid of held-out images, each beside its reconstruction."""
        pictures = held_out[:PREVIEW_IMAGES]
        both = torch.stack([pictures, to_uint8(reconstruct(pictures))], 1).flatten(0, 1)
        write_png(path, labelled_grid(both, columns=8, scale=2))

    fit(
        dict(model.named_parameters()),
        loss_fn,
        get_batch,
        config.training,
        config.run_dir,
        settings=settings_of(config, fill50k=bool(config.fill50k), data_hash=tensors_hash(images)),
        save=lambda folder: save_network(folder, model, torch.float16),
        validate=validate,
        preview=preview,
        next_command="bash scripts/train_ldm.sh unet --autoencoder LAST",
    )


@torch.no_grad()
def check_sizes(model: "AutoencoderDC") -> None:
    """Raises an error if pictures do not pass through the autoencoder at their size."""
    side = side_of(model)
    picture = torch.zeros(1, 3, side, side)
    if model.decode(model.encode(picture).latent).sample.shape != picture.shape:
        raise InputError("pictures come out at another size")


def _start(folder: Path, sizes: AutoencoderConfig) -> "AutoencoderDC":
    """The autoencoder in the folder. Raises InputError if `sizes` asks for others than it has."""
    from diffusers import AutoencoderDC

    model = load_network(folder, AutoencoderDC)
    own = model.config
    of_start = AutoencoderConfig(
        tuple(own.encoder_block_out_channels[1:]),
        tuple(own.encoder_layers_per_block[1:]),
        tuple(own.decoder_layers_per_block[1:]),
        own.latent_channels,
    )
    check_sizes_of_start(folder, sizes, AutoencoderConfig(), of_start)
    return model


if __name__ == "__main__":
    cli.run(main, Config)
