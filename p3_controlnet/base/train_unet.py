"""Trains the U-Net of the small latent-diffusion model on frozen latents and text features.

    python3 -m p3_controlnet.base.train_unet --run-dir runs/ldm_unet \
        --autoencoder runs/ldm_autoencoder/last \
        --text-encoder runs/ldm_text/last --fill50k hw2_data/fill50k

Running the same command again resumes. Images and captions are encoded once, before the first step,
so a step computes the U-Net only. RUN_DIR/last is a diffusers folder with all parts of the model,
in float16.
"""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
import tyro
from torch import Tensor

from common import cli
from common.checkpoint import state_hash
from common.cli import Preset
from common.config import Pictures, Probability
from common.data.examples import DrawnScenes, ExampleDataset, RealPairs, drawn_examples
from common.devices import make_accelerator
from common.diffusion.loss import LossWeight, LossWeighting, TimestepDistribution
from common.diffusion.process import Parameterization
from common.diffusion.schedule import make_schedule
from common.errors import InputError
from common.grid import labelled_grid
from common.images import to_model_range, to_uint8, write_png
from common.latent.generate import GenerationConfig, Request, generate
from common.latent.model import LatentDiffusion
from common.latent.small import (
    UNetConfig,
    build_unet,
    guidance_defaults,
    latent_statistics,
    load_network,
    save_model,
    side_of,
)
from common.latent.text_encoder import load_text_encoder
from common.seeds import Draws, derive_seeds
from common.training import (
    Batch,
    TrainingConfig,
    check_sizes_of_start,
    fit,
    micro_batches_of,
    new_network,
    settings_of,
)
from common.validation import held_out_loss
from p3_controlnet.latent_cache import CachedBatches, LatentCache
from p3_controlnet.loss import latent_loss

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

VALIDATION_SEED, VALIDATION_EXAMPLES = 1, 256
MEASURED_EXAMPLES = 512  # images from which the latents' mean and standard deviation are computed
PREVIEW_PROMPTS = (
    "red circle with blue background",
    "pale golden rod circle with old lace background",
    "light sky blue circle with peru background",
    "dark green square with pink background",
    "orange star with indigo background",
    "teal triangle with wheat background",
    "red circle next to lime star with blue background",
    "gold square next to purple circle with white background",
)
PREVIEW_COLUMNS = 4


TRAINING = TrainingConfig(
    steps=16_000,
    batch_size=64,
    optimizer="muon",
    lr=5e-3,
    lr_schedule="constant",
    ema_decay=0.9995,
    validate_every=1000,
    preview_every=1000,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains the U-Net of the small latent-diffusion model."""

    run_dir: Path
    """Folder of the run: checkpoints, metrics, previews, and the cache of latents and text
    features."""
    autoencoder: Path
    """Folder of the trained autoencoder."""
    text_encoder: Path
    """Folder of the text encoder, as `p3_controlnet.base.train_text` writes it."""
    fill50k: Path | None = None
    """Folder of fill50k, in the homework's layout, whose training images are added to the drawn
    ones; None for drawn images only."""
    init_from: Path | None = None
    """Folder of a U-Net to start from (unet/ in a model's folder), instead of random weights. Of a
    U-Net for other latents, the weights are taken that fit the sizes of --model."""
    pictures: Pictures = 60_000
    """Number of drawn training images."""
    cond_drop_prob: Probability = 0.1
    """Probability that a caption is replaced by the empty prompt; classifier-free guidance needs
    some."""
    parameterization: Parameterization = "v"
    """What the U-Net predicts: eps (the noise), x0 (the clean latents) or v (velocity)."""
    zero_terminal: bool = True
    """Rescale the noise schedule so that its last step is pure noise, SNR 0 (arXiv:2305.08891)."""
    channelwise: bool = True
    """Normalise each channel of the latents by its own mean and standard deviation, instead of
    dividing all channels by one number as Stable Diffusion does."""
    loss_weight: LossWeight = "learned"
    """Loss weight of the noise levels. learned: by a learned log-variance; min_snr: min(SNR + 1, 5)
    on the x0 error (min(SNR, 5) with eps prediction); none: the plain error of the U-Net's output.
    """
    timesteps: TimestepDistribution = "mixed"
    """Distribution of the timesteps t in training. mixed: half uniform, half logit-normal; shifted:
    denser at high noise."""
    model: UNetConfig = UNetConfig()
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = TRAINING
    PRESETS: ClassVar = {
        "small": Preset(
            "the defaults: five hours on two CPU cores with --mixed-precision bf16 --compile"
            " (estimated from the time of a step)",
            {},
        ),
        "smoke": Preset(
            "tests the installation: two steps, about a minute on a CPU;"
            " expect a held-out loss of about 0.4",
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
    if config.parameterization == "eps" and config.zero_terminal:
        raise InputError(
            "eps prediction needs --no-zero-terminal: at SNR 0, in pure noise, x0 cannot be"
            " computed from eps"
        )
    accelerator = make_accelerator(config.training.device, config.training.mixed_precision)
    micro_batches_of(config.training, accelerator)  # refuses what would not divide, before encoding
    torch.manual_seed(config.training.seed)
    model = new_model(config).to(accelerator.device)
    model.choose_attention(config.training.mixed_precision)
    network = model.unet.requires_grad_(True).train()
    weighting = LossWeighting(config.loss_weight, config.parameterization, config.timesteps).to(
        accelerator.device
    )
    frozen = state_hash(torch.nn.ModuleList([model.autoencoder, model.text_encoder]))

    seed, side = config.training.seed, model.side
    data: ExampleDataset = DrawnScenes(config.pictures, side, seed)
    if config.fill50k:
        data = data + RealPairs(config.fill50k, side, hints=False)
    made_from = {"networks": frozen, "channelwise": config.channelwise}
    cache = LatentCache.cached(config.run_dir / "latent_cache", model, data, made_from)
    held_out = LatentCache.cached(
        config.run_dir / "validation_cache",
        model,
        DrawnScenes(VALIDATION_EXAMPLES, side, VALIDATION_SEED + seed),
        made_from,
    )
    null = cache.null.to(accelerator.device)
    # Validations and previews have batches of other sizes, for each of which it would be compiled.
    training_network = torch.compile(model.apply_model) if config.training.compile else None

    def loss_of(batch: Batch, draws: Draws, cond_drop_prob: float, **options: Any) -> Tensor:
        return latent_loss(model, batch, null, draws, cond_drop_prob=cond_drop_prob, **options)

    def validate() -> dict[str, float]:
        """Unweighted error of the U-Net's output on held-out drawn images, captions kept.

        The images, t and their noise are the same each time.
        """
        images = held_out.take(torch.arange(len(held_out)))
        return {
            "loss": held_out_loss(network, lambda batch, draws: loss_of(batch, draws, 0.0), images)
        }

    def preview(path: Path) -> None:
        """Writes a grid of images: a row for each of `PREVIEW_PROMPTS`."""
        prompts = [prompt for prompt in PREVIEW_PROMPTS for _ in range(PREVIEW_COLUMNS)]
        requests = [
            Request(*pair)
            for pair in zip(prompts, derive_seeds(0, count=len(prompts)), strict=True)
        ]
        network.eval()
        images = [x for _, x in generate(model, requests, GenerationConfig(), show_progress=False)]
        network.train()
        write_png(
            path,
            labelled_grid(
                to_uint8(torch.cat(images)), PREVIEW_COLUMNS, row_labels=list(PREVIEW_PROMPTS)
            ),
        )

    def loss_fn(batch: Batch, draws: Draws) -> Tensor:
        options = {"network": training_network, **weighting.options}
        return loss_of(batch, draws, config.cond_drop_prob, **options)

    fit(
        dict(network.named_parameters()) | dict(weighting.named_parameters("weighting")),
        loss_fn,
        CachedBatches(cache, config.training.batch_size, seed),
        config.training,
        config.run_dir,
        settings=settings_of(
            config, "autoencoder", "text_encoder", fill50k=bool(config.fill50k), frozen=frozen
        ),
        save=lambda folder: save_model(folder, model, config.zero_terminal),
        validate=validate,
        preview=preview,
        next_command="bash scripts/train_controlnet.sh --base LAST",
    )


def new_model(config: Config) -> LatentDiffusion:
    """The frozen autoencoder and text encoder with the U-Net to train.

    The U-Net is the one in `config.init_from`, or else randomly initialised. Raises InputError if
    it does not fit the latents or the text features.
    """
    from diffusers import AutoencoderDC

    autoencoder = load_network(config.autoencoder, AutoencoderDC)
    tokenizer, text_encoder = load_text_encoder(config.text_encoder)
    width = text_encoder.config.hidden_size

    @torch.no_grad()
    def evaluate(unet: "UNet2DConditionModel") -> None:
        latents = torch.zeros(1, unet.config.in_channels, *2 * [unet.config.sample_size])
        unet(latents, torch.zeros(1), torch.zeros(1, 1, width))

    unet = new_network(lambda: build_unet(config.model, autoencoder, width), evaluate)
    if config.init_from:
        new, unet = unet, initialised_from(config.init_from, unet)
        if unet is not new:
            check_sizes_of_start(config.init_from, config.model, UNetConfig(), sizes_of(unet))
    schedule = make_schedule("scaled_linear", zero_terminal=config.zero_terminal)
    measured = drawn_examples(MEASURED_EXAMPLES, side_of(autoencoder), seed=0).images
    return LatentDiffusion(
        autoencoder,
        text_encoder,
        tokenizer,
        unet,
        schedule,
        parameterization=config.parameterization,
        **guidance_defaults(unet),
        **latent_statistics(autoencoder, to_model_range(measured), channelwise=config.channelwise),
    )


def sizes_of(unet: "UNet2DConditionModel") -> UNetConfig:
    """The sizes with which `build_unet` makes such a U-Net."""
    own = unet.config
    return UNetConfig(
        tuple(own.block_out_channels),
        own.layers_per_block,
        own.attention_head_dim,
        own.norm_num_groups,
    )


def initialised_from(folder: Path, new: "UNet2DConditionModel") -> "UNet2DConditionModel":
    """The U-Net in the folder or, if its latents have other channels than those of `new`, `new`.

    `new` then gets every weight that has its name and shape, but for the first and the last
    convolution, and this is printed. Raises InputError if the U-Net in the folder does not fit the
    text features or the side of the latents.
    """
    unet = load_network(folder, type(new))
    for name in ("sample_size", "cross_attention_dim"):
        if unet.config[name] != new.config[name]:
            raise InputError(
                f"the U-Net in {folder} has {name} {unet.config[name]}, but the autoencoder and the"
                f" text encoder need {new.config[name]}"
            )
    if all(unet.config[name] == new.config[name] for name in ("in_channels", "out_channels")):
        return unet
    own = new.state_dict()
    fitting = {
        name: value
        for name, value in unet.state_dict().items()
        if name in own
        and value.shape == own[name].shape
        and not name.startswith(("conv_in.", "conv_out."))
    }
    new.load_state_dict(fitting, strict=False)
    print(
        f"the U-Net in {folder} is for other latents: {len(fitting)} of {len(own)} weights are"
        " taken from it, the others start anew",
        file=sys.stderr,
    )
    return new


if __name__ == "__main__":
    cli.run(main, Config)
