"""The small latent-diffusion model: Stable Diffusion's own kinds of networks, in sizes that a CPU can train.

Pictures of 64x64, latents of 16x16 with 4 channels, the text tower of the project's small CLIP as conditioner. It is stored as a
diffusers folder, so it is loaded, controlled and personalised by the code that does so for Stable Diffusion.
"""

import copy
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from common.checkpoint import load_config, load_strict, load_tensors, save_tensors
from common.diffusion import Parameterization
from common.errors import InputError
from common.files import make_folder, read_json, write_json
from common.latent_diffusion import LatentDiffusion
from common.schedule import make_schedule
from common.stable_diffusion.naming import CONFIG_FILE, SCHEDULER_FILE, WEIGHTS_FILE
from common.text import load_text_encoder

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel

KIND = "small_diffusion"
SIDE = 64
PREDICTION_TYPES: dict[Parameterization, str] = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """What builds the autoencoder."""

    channels: tuple[int, ...] = (32, 48, 64)
    """Channels at 64x64, 32x32 and 16x16."""
    layers: int = 1
    """Residual blocks at each resolution of the encoder; the decoder has one more."""
    latent_channels: int = 4
    """Channels of the latents."""
    groups: int = 16
    """Groups of the normalisation."""


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """What builds the U-Net."""

    channels: tuple[int, ...] = (64, 128, 192)
    """Channels at 16x16, 8x8 and 4x4."""
    layers: int = 1
    """Residual blocks, each with self- and cross-attention, at each resolution; the decoder has one more."""
    heads: int = 4
    """Attention heads."""
    groups: int = 16
    """Groups of the normalisation."""


def build_autoencoder(config: AutoencoderConfig) -> "AutoencoderKL":
    """A new autoencoder with latents of a quarter of the side (for three resolutions)."""
    from diffusers import AutoencoderKL

    levels = len(config.channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        latent_channels=config.latent_channels,
        norm_num_groups=config.groups,
        sample_size=SIDE,
        scaling_factor=1.0,  # see `with_normal_latents`
        mid_block_add_attention=False,
    )


def build_unet(config: UNetConfig, autoencoder: "AutoencoderKL", context_width: int) -> "UNet2DConditionModel":
    """A new U-Net for the latents of an autoencoder, conditioned on text features of the given width."""
    from diffusers import UNet2DConditionModel

    levels = len(config.channels)
    return UNet2DConditionModel(
        sample_size=SIDE // 2 ** (len(autoencoder.config.block_out_channels) - 1),
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
# The model's folder: the layout of a diffusers pipeline, and a config.json that says that it is one of these.


def save_model(folder: Path, model: LatentDiffusion, zero_terminal: bool, dtype: torch.dtype = torch.float16) -> None:
    """Writes all parts: unet/, vae/, text_encoder/ and scheduler/. The tokenizer is always CLIP's own."""
    folder = Path(folder)
    save_network(folder / "unet", model.unet, dtype)
    save_network(folder / "vae", model.autoencoder, dtype)
    text = model.text_encoder
    make_folder(folder / "text_encoder")
    save_tensors(folder / "text_encoder" / "model.safetensors", {k: v.to(dtype) for k, v in text.state_dict().items()})
    write_json(folder / "text_encoder" / CONFIG_FILE, text.config.to_dict())
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
    write_json(folder / CONFIG_FILE, {"kind": KIND})


def load_model(folder: Path) -> LatentDiffusion:
    """Reads a folder written by `save_model`, as float32 on the CPU. Raises InputError if it holds something else."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    folder = Path(folder)
    load_config(folder, KIND)
    scheduler = read_json(folder / "scheduler" / SCHEDULER_FILE)
    try:
        schedule = make_schedule("scaled_linear", zero_terminal=scheduler["rescale_betas_zero_snr"])
        parameterization = next(k for k, v in PREDICTION_TYPES.items() if v == scheduler["prediction_type"])
    except (KeyError, TypeError, StopIteration):
        raise InputError(
            f"{folder / 'scheduler' / SCHEDULER_FILE} does not describe a noise schedule of this program"
        ) from None
    tokenizer, text_encoder = load_text_encoder(folder / "text_encoder")
    return LatentDiffusion(
        load_network(folder / "vae", AutoencoderKL),
        text_encoder,
        tokenizer,
        load_network(folder / "unet", UNet2DConditionModel),
        schedule,
        parameterization=parameterization,
        latent_std=1.0,
    )


def save_network(folder: Path, network: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Writes a network of diffusers as its own folder, atomically; the weights as `dtype` if given."""
    make_folder(folder)
    state = {name: value if dtype is None else value.to(dtype) for name, value in network.state_dict().items()}
    save_tensors(Path(folder) / WEIGHTS_FILE, state)
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    write_json(Path(folder) / CONFIG_FILE, {"_class_name": type(network).__name__, **config})


def load_network(folder: Path, kind: type[nn.Module]) -> Any:
    """Reads a folder written by `save_network`, in evaluation mode. Raises InputError if it holds something else."""
    config = read_json(Path(folder) / CONFIG_FILE)
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name != kind.__name__:
        raise InputError(f"{folder} holds a {name}, but {kind.__name__} is expected")
    try:
        network = kind.from_config(config)
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise InputError(f"{folder}/config.json does not describe a {kind.__name__} ({error})") from None
    state = load_tensors(Path(folder) / WEIGHTS_FILE)[0]
    load_strict(network, {key: value.float() for key, value in state.items()}, folder)
    return network.eval()


@torch.no_grad()
def with_normal_latents(autoencoder: "AutoencoderKL", images: Tensor) -> "AutoencoderKL":
    """A copy whose latents of these images [N, 3, H, W] in [-1, 1] have mean 0 and variance 1 in every channel.

    Stable Diffusion divides all channels by one number; here the channels' own mean and deviation go into the two 1x1
    convolutions around the latents, so that the stored model has a scale factor of 1 and no further constants.
    """
    latents = torch.cat([autoencoder.encode(part).latent_dist.mean for part in images.split(64)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3)).clamp(min=1e-6)
    result = copy.deepcopy(autoencoder)
    channels = len(mean)
    before, after = result.quant_conv, result.post_quant_conv  # moments = [means, log-variances]
    before.weight[:channels] /= std.view(-1, 1, 1, 1)
    before.bias[:channels] = (before.bias[:channels] - mean) / std
    before.bias[channels:] -= 2.0 * std.log()
    after.bias += (after.weight * mean.view(1, -1, 1, 1)).sum((1, 2, 3))
    after.weight *= std.view(1, -1, 1, 1)
    return result


def psnr(images: Tensor, others: Tensor) -> float:
    """The mean over images in [-1, 1] of the peak signal-to-noise ratio, in dB."""
    error = (images - others).square().flatten(1).mean(1) / 4.0
    return (-10.0 * error.clamp(min=1e-10).log10()).mean().item()
