"""The small latent-diffusion model and a ControlNet for it, with few channels and fixed random
weights."""

from pathlib import Path

import torch
from clip_tiny import tiny_clip
from tiny_latent import awake, seeded

from common.diffusion.schedule import make_schedule
from common.latent.model import LatentDiffusion
from common.latent.small import (
    AutoencoderConfig,
    UNetConfig,
    build_autoencoder,
    build_unet,
    guidance_defaults,
    save_model,
)
from common.latent.text_encoder import clip_tokenizer, text_tower
from p3_controlnet.model import ControlNet

AUTOENCODER = AutoencoderConfig((8, 16), (1, 1), (2, 1), latent_channels=4)
UNET = UNetConfig(channels=(16, 32), heads=2, groups=4)
HINT_CHANNELS = (4, 8, 8)
SMALL_UNET = ("--model.channels", 16, 32, "--model.heads", 2, "--model.groups", 4)
SMALL_AUTOENCODER = ("--model.channels", 8, 8, 16)


def tiny_base() -> LatentDiffusion:
    """Pictures of 64x64, latents of 16x16."""
    clip = tiny_clip()
    autoencoder = seeded(build_autoencoder, AUTOENCODER)
    unet = seeded(build_unet, UNET, autoencoder, clip.token_embedding.embedding_dim)
    with torch.no_grad():
        unet.conv_out.weight *= 0.3  # a random network amplifies rounding along the steps
    schedule = make_schedule("scaled_linear", zero_terminal=True)
    tokenizer = clip_tokenizer(clip.context_length)
    more = {
        "latent_mean": (0.1, -0.1, 0.0, 0.2),
        "latent_std": (1.1, 0.9, 1.0, 1.2),
        **guidance_defaults(unet),
    }
    return LatentDiffusion(
        autoencoder, text_tower(clip), tokenizer, unet, schedule, parameterization="v", **more
    )


def tiny_control(base: LatentDiffusion, scale: float = 0.3) -> ControlNet:
    """A ControlNet that has an effect."""
    return awake(seeded(ControlNet.from_unet, base.unet, HINT_CHANNELS), scale).eval()


def save_small_models(root: Path) -> Path:
    """Writes base/ and control/, the folders of both; returns `root`."""
    base = tiny_base()
    save_model(root / "base", base, zero_terminal=True)
    tiny_control(base).save(root / "control")
    return root
