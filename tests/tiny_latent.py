"""A latent-diffusion model in Stable Diffusion's form with fixed random weights: 13 residuals,
16x16 latents, 3,000 times smaller."""

import string
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from common.diffusion.schedule import scaled_linear_schedule
from common.latent.model import LatentCondition, LatentDiffusion
from p3_controlnet.model import ControlNet

WIDTH = 16  # of the text features
HINT_CHANNELS = (4, 4, 8, 8)
UNET = {
    "sample_size": 16,
    "block_out_channels": (8, 16, 16, 16),
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": WIDTH,
}
TWO_LEVELS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "layers_per_block": 1,
}
"""A U-Net of another structure, with 5 residuals."""
SCHEDULE = scaled_linear_schedule()


def tiny_unet(**more: Any) -> UNet2DConditionModel:
    """A U-Net of Stable Diffusion's four levels."""
    return seeded(UNet2DConditionModel, **{**UNET, **more})


def tiny_model(control: nn.Module | None = None, **more: Any) -> LatentDiffusion:
    """All parts; images of 128x128, an eighth of that in latents."""
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    autoencoder = seeded(
        AutoencoderKL, **blocks, block_out_channels=(4, 4, 8, 8), norm_num_groups=4
    )
    tokenizer = tiny_tokenizer()
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = seeded(
        CLIPTextModel,
        CLIPTextConfig(
            vocab_size=len(tokenizer), **sizes, eos_token_id=1, bos_token_id=0, pad_token_id=1
        ),
    )
    unet = more.pop("unet", None) or tiny_unet()
    return LatentDiffusion(autoencoder, text, tokenizer, unet, SCHEDULE, controlnet=control, **more)


def tiny_tokenizer() -> CLIPTokenizer:
    """Knows the small letters, padded with the end token as Stable Diffusion's."""
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {
        token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])
    }
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def controlled_model(**more: Any) -> LatentDiffusion:
    """The model with a ControlNet that has an effect: what starts at zero has small values."""
    unet = more.pop("unet", None) or tiny_unet()
    return tiny_model(awake(ControlNet.from_unet(unet, HINT_CHANNELS)), unet=unet, **more)


def awake(control: nn.Module, scale: float = 0.1) -> nn.Module:
    """Fills the zero convolutions with small random values."""
    generator = torch.Generator().manual_seed(1)
    zero = ("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding.conv_out")
    with torch.no_grad():
        for name, param in control.named_parameters():
            if name.startswith(zero):
                param.copy_(torch.randn(param.shape, generator=generator) * scale)
    return control


def seeded(build: Any, *args: Any, **kwargs: Any) -> Any:
    """The same random weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(*args, **kwargs).eval()


def text_condition(
    model: LatentDiffusion, prompts: Sequence[str], hint: Tensor | None = None
) -> LatentCondition:
    """The condition of prompts and hints [N, 3, H, W] in [0, 1]."""
    return LatentCondition(model.encode_text(prompts), hint)


def inputs(count: int = 2) -> tuple[Tensor, Tensor]:
    """x_t and t."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 4, 16, 16, generator=generator), torch.arange(count) * 300 + 50


def condition(count: int = 2, seed: int = 3, hint: bool = True, **more: Any) -> LatentCondition:
    """Random text features and a random hint."""
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(count, 77, WIDTH, generator=generator)
    hints = torch.rand(count, 3, 128, 128, generator=generator)
    return LatentCondition(context, hints if hint else None, **more)
