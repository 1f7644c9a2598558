"""The small latent-diffusion model, of a size that a CPU can train.

Pictures are 128x128, latents 16x16 with 8 channels: a latent spans 8x8 pixels, as Stable
Diffusion's does. The networks are of the same classes as Stable Diffusion's, except for the
autoencoder. The text encoder is that of the project's small CLIP, tuned
on captions alone (`p3_controlnet.base.train_text`). The model is stored as a diffusers folder, so
the code that loads, controls and personalises Stable Diffusion also serves this model.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from common.checkpoint import build_network, load_config, load_strict, save_tensors
from common.config import Depth, Positive, Size, check_entries, check_value, read_entries
from common.diffusion.process import Parameterization
from common.diffusion.schedule import make_schedule
from common.errors import InputError
from common.files import make_folder, write_json
from common.latent.model import Guidance, LatentDiffusion, downscale_of
from common.latent.network_config import NETWORK, SCHEDULER, Layers
from common.latent.stable_diffusion.naming import CONFIG_FILE, SCHEDULER_FILE, WEIGHTS_FILE
from common.latent.text_encoder import load_text_encoder, save_text_encoder
from common.weights import followed, read_weights, weights_file

if TYPE_CHECKING:
    from diffusers import AutoencoderDC, UNet2DConditionModel

KIND = "small_diffusion"
LATENT_SIDE = 16  # of all small models
DEFAULT_GUIDANCE = Guidance(1.0, 3.0)
DEFAULT_CONTROLLED_GUIDANCE = Guidance(2.0, 0.0)
LATENT_STATISTICS = ("latent_mean", "latent_std")
PREDICTION_TYPES: dict[Parameterization, str] = {
    "eps": "epsilon",
    "x0": "sample",
    "v": "v_prediction",
}


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the autoencoder.

    It folds 2x2 pixels into channels, so its highest resolution is half of the pictures' side.
    """

    channels: tuple[Size, ...] = (32, 64, 128)
    """Channels at 64x64, 32x32 and 16x16."""
    encoder_layers: tuple[Layers, ...] = (1, 1, 1)
    """Residual blocks of the encoder at each resolution."""
    decoder_layers: tuple[Layers, ...] = (2, 1, 1)
    """Residual blocks of the decoder at each resolution."""
    latent_channels: Size = 8
    """Channels of the latents."""


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Sizes of the U-Net."""

    channels: tuple[Size, ...] = (64, 128, 128)
    """Channels at 16x16, 8x8 and 4x4."""
    layers: Depth = 1
    """Residual blocks per resolution, each with self- and cross-attention; the decoder has one
    more."""
    heads: Depth = 4
    """Number of attention heads."""
    groups: Depth = 8
    """Number of groups of the group normalisation."""


def build_autoencoder(config: AutoencoderConfig) -> "AutoencoderDC":
    """A new autoencoder; with three resolutions the latents have an eighth of the pictures' side.

    It is the deep-compression autoencoder (Chen et al. 2024, arXiv:2410.10733), not Stable
    Diffusion's. The group normalisation of the latter takes its statistics over the whole picture,
    so a flat colour is reconstructed with a shift that depends on the rest of the picture, and a
    small network needs very long to unlearn that. Here each position is normalised by itself, in
    the residual branches and before the last convolution. The residual branches are initialised to
    zero (arXiv:1706.02677), so at first the shortcuts alone carry the colours.
    """
    from diffusers import AutoencoderDC

    if not len(config.channels) == len(config.encoder_layers) == len(config.decoder_layers):
        raise InputError(
            "--model.channels, --model.encoder-layers and --model.decoder-layers must have equally"
            " many numbers"
        )

    levels = len(config.channels) + 1
    # The first is unused: there are no layers at the pictures' own resolution.
    channels = (config.channels[0], *config.channels)
    network = AutoencoderDC(
        latent_channels=config.latent_channels,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(0, *config.encoder_layers),
        decoder_layers_per_block=(0, *config.decoder_layers),
        encoder_qkv_multiscales=((),) * levels,
        decoder_qkv_multiscales=((),) * levels,
    )
    for name, parameter in network.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.zeros_(parameter)
    return network


def side_of(autoencoder: "AutoencoderDC") -> int:
    """Side in pixels of the pictures for which a small model with this autoencoder is trained."""
    return LATENT_SIDE * downscale_of(autoencoder)


def build_unet(
    config: UNetConfig, autoencoder: "AutoencoderDC", context_width: int
) -> "UNet2DConditionModel":
    """A new U-Net for the latents of `autoencoder`, conditioned on text features.

    The text features are [N, L, context_width].
    """
    from diffusers import UNet2DConditionModel

    levels = len(config.channels)
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=autoencoder.config.latent_channels,
        out_channels=autoencoder.config.latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        attention_head_dim=config.heads,  # diffusers' name for the number of heads
        cross_attention_dim=context_width,
        norm_num_groups=config.groups,
    )


# ----------------------------------------------------------------------------
# The model's folder: a diffusers pipeline with a config.json that states the kind KIND.


def save_model(
    folder: Path, model: LatentDiffusion, zero_terminal: bool, dtype: torch.dtype = torch.float16
) -> None:
    """Writes unet/, vae/, text_encoder/, scheduler/ and config.json; weights are stored as `dtype`.

    The tokenizer is always CLIP's and is not written.
    """
    folder = Path(folder)
    save_network(folder / "unet", model.unet, dtype)
    save_network(folder / "vae", model.autoencoder, dtype)
    save_text_encoder(folder / "text_encoder", model.text_encoder, dtype)
    scheduler = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": model.schedule.num_timesteps,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "rescale_betas_zero_snr": zero_terminal,
        "prediction_type": PREDICTION_TYPES[model.parameterization],
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "set_alpha_to_one": True,
    }
    make_folder(folder / "scheduler")
    write_json(folder / "scheduler" / SCHEDULER_FILE, scheduler)
    channels = model.autoencoder.config.latent_channels
    statistics = {
        name: getattr(model, name).flatten().expand(channels).tolist() for name in LATENT_STATISTICS
    }
    write_json(folder / CONFIG_FILE, {"kind": KIND, **statistics})


def load_model(folder: Path) -> LatentDiffusion:
    """Reads a folder written by `save_model`, as float32 on the CPU.

    Raises InputError if the folder holds something else.
    """
    from diffusers import AutoencoderDC, UNet2DConditionModel

    folder = followed(folder)
    config = load_config(folder, KIND)
    path = folder / "scheduler" / SCHEDULER_FILE
    scheduler = read_entries(path, SCHEDULER, required=True)
    if scheduler.get("trained_betas") is not None:
        raise InputError(
            f"{path}: trained_betas must be null: the small model has no such schedule"
        )
    schedule = make_schedule("scaled_linear", zero_terminal=scheduler["rescale_betas_zero_snr"])
    parameterization = next(
        k for k, v in PREDICTION_TYPES.items() if v == scheduler["prediction_type"]
    )
    autoencoder = load_network(folder / "vae", AutoencoderDC)
    channels = autoencoder.config.latent_channels
    for name, number in zip(LATENT_STATISTICS, (float, Positive), strict=True):
        values = config.get(name)
        check_value(values, tuple[number, ...], f"{folder / CONFIG_FILE}: {name}")
        if len(values) != channels:
            raise InputError(
                f"{folder / CONFIG_FILE}: {name} must be {channels} numbers, one for each latent"
                f" channel, not {len(values)}"
            )
    tokenizer, text_encoder = load_text_encoder(folder / "text_encoder")
    unet = load_network(folder / "unet", UNet2DConditionModel)
    for name, needed in (
        ("sample_size", LATENT_SIDE),
        ("in_channels", channels),
        ("out_channels", channels),
        ("cross_attention_dim", text_encoder.config.hidden_size),
    ):
        if unet.config[name] != needed:
            raise InputError(
                f"{folder / 'unet' / CONFIG_FILE}: {name} is {unet.config[name]}, but the"
                f" autoencoder and the text encoder need {needed}"
            )
    return LatentDiffusion(
        autoencoder,
        text_encoder,
        tokenizer,
        unet,
        schedule,
        parameterization=parameterization,
        **guidance_defaults(unet),
        **{name: config[name] for name in LATENT_STATISTICS},
    )


def guidance_defaults(unet: "UNet2DConditionModel") -> dict[str, Any]:
    """The settings of `LatentDiffusion` for guidance of a small model.

    Perturbed attention covers all blocks but those of the highest resolution.
    """
    levels = range(len(unet.config.block_out_channels))
    down = [f"down_blocks.{i}" for i in levels[1:]]
    up = [f"up_blocks.{i}" for i in levels[:-1]]
    return {
        "default_guidance": DEFAULT_GUIDANCE,
        "default_controlled_guidance": DEFAULT_CONTROLLED_GUIDANCE,
        "pag_applied_layers": (*down, "mid_block", *up),
    }


def save_network(folder: Path, network: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Writes a diffusers network to its own folder, atomically.

    The weights are stored as `dtype`, or unchanged for None.
    """
    make_folder(folder)
    state = {
        name: value if dtype is None else value.to(dtype)
        for name, value in network.state_dict().items()
    }
    save_tensors(Path(folder) / WEIGHTS_FILE, state)
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    write_json(Path(folder) / CONFIG_FILE, {"_class_name": type(network).__name__, **config})


def load_network(folder: Path, kind: type[nn.Module]) -> Any:
    """Reads a folder written by `save_network`, as float32 in evaluation mode.

    Raises InputError if the folder holds something else.
    """
    path = Path(folder) / CONFIG_FILE
    config = read_entries(path, {})
    if (name := config.get("_class_name")) != kind.__name__:
        raise InputError(f"{folder} holds a {name}, but {kind.__name__} is expected")
    check_entries(config, NETWORK, path)
    weights = weights_file(Path(folder))
    network = build_network(
        lambda: kind.from_config(dict(config)), path, f"a {kind.__name__}", weights
    )
    load_strict(network, read_weights(weights), weights)
    return network.eval()


@torch.no_grad()
def latent_statistics(
    autoencoder: "AutoencoderDC", images: Tensor, *, channelwise: bool = True
) -> dict[str, list[float]]:
    """`latent_mean` and `latent_std` of `LatentDiffusion`, one number for each channel.

    They are computed from the latents of `images` [N, 3, H, W] in [-1, 1]. Latents normalised with
    them have mean 0 and variance 1 in every channel, as the noise has. With `channelwise` off they
    follow Stable Diffusion: the standard deviation of all latents for every channel, and mean 0.
    """
    latents = torch.cat([autoencoder.encode(part).latent for part in images.split(64)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3)).clamp(min=1e-6)
    values = (mean, std) if channelwise else (torch.zeros_like(mean), latents.std().expand_as(std))
    return {name: value.tolist() for name, value in zip(LATENT_STATISTICS, values, strict=True)}


def psnr(images: Tensor, others: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], averaged over the images."""
    error = (images - others).square().flatten(1).mean(1) / 4.0
    return (-10.0 * error.clamp(min=1e-10).log10()).mean().item()
