"""ControlNet (Zhang et al. 2023, arXiv:2302.05543): a trained copy of a U-Net's encoder that steers
the frozen U-Net by a hint.

The frozen U-Net and the addition of the residuals are in `common/latent/model.py`. Keys of the
state dict, and the folder that `save` writes, are those of diffusers' `ControlNetModel`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from common.checkpoint import load_strict, load_tensors, save_tensors
from common.errors import InputError
from common.files import make_folder, read_json, write_json
from common.latent.stable_diffusion.naming import CONFIG_FILE, CONTROL_CLASS, WEIGHTS_FILE

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

SD_HINT_CHANNELS = (16, 32, 96, 256)

# What of a U-Net's configuration shapes its encoder; diffusers' U-Net and its ControlNet share
# these names.
ENCODER_KEYS = (
    "in_channels",
    "flip_sin_to_cos",
    "freq_shift",
    "down_block_types",
    "mid_block_type",
    "only_cross_attention",
    "block_out_channels",
    "layers_per_block",
    "downsample_padding",
    "mid_block_scale_factor",
    "act_fn",
    "norm_num_groups",
    "norm_eps",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "attention_head_dim",  # diffusers' name for the NUMBER of heads: 8 means 8 heads
    "use_linear_projection",
    "upcast_attention",
    "resnet_time_scale_shift",
)
# What a configuration may not ask for, because Stable Diffusion's own networks never do.
FIXED = {
    "num_attention_heads": None,
    "center_input_sample": False,
    "encoder_hid_dim": None,
    "class_embed_type": None,
    "num_class_embeds": None,
    "addition_embed_type": None,
    "dual_cross_attention": False,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "attention_type": "default",
    "cross_attention_norm": None,
    "conditioning_channels": 3,
    "controlnet_conditioning_channel_order": "rgb",
    "global_pool_conditions": False,
}


class ControlNet(nn.Module):
    """Predicts from x_t [N, C, h, w], hint [N, 3, H, W] in [0, 1], t long [N] and context [N, L, D]
    the control residuals.

    `unet_config` is the configuration of the base U-Net (`unet.config`) or the `config.json` of a
    diffusers ControlNet: keys that do not concern the encoder are ignored. `hint_channels` are
    those of the hint encoder, Stable Diffusion's by default; each step from one to the next divides
    the hint's sides by its entry of `hint_strides` (default: 2 each, the only value that diffusers
    knows). Their product must be the factor between pixels and latents.

    The weights are new. `from_unet` is what starts a training; `load` reads a trained one. Raises
    InputError on a configuration that is not of Stable Diffusion's kind.
    """

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        hint_channels: Sequence[int] = SD_HINT_CHANNELS,
        hint_strides: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        hint_strides = tuple(hint_strides or (2,) * (len(hint_channels) - 1))
        if len(hint_channels) < 2 or len(hint_strides) != len(hint_channels) - 1:
            raise InputError(
                "a hint encoder needs one stride less than channels, not channels"
                f" {list(hint_channels)} and strides {list(hint_strides)}"
            )
        self.hint_channels, self.hint_strides = tuple(hint_channels), hint_strides
        self.gradient_checkpointing = False

        encoder = _new_encoder(unet_config)
        self.encoder_config = {key: encoder.config[key] for key in ENCODER_KEYS}
        self.conv_in = encoder.conv_in
        self.time_proj, self.time_embedding = encoder.time_proj, encoder.time_embedding
        self.down_blocks, self.mid_block = encoder.down_blocks, encoder.mid_block

        width = self.conv_in.out_channels
        self.controlnet_cond_embedding = HintEncoder(self.hint_channels, hint_strides, width)
        self.controlnet_down_blocks = nn.ModuleList(
            zero_conv(c, c, 1) for c in _skip_channels(width, self.down_blocks)
        )
        last = self.encoder_config["block_out_channels"][-1]
        self.controlnet_mid_block = zero_conv(last, last, 1)

    @classmethod
    def from_unet(
        cls,
        unet: "UNet2DConditionModel",
        hint_channels: Sequence[int] = SD_HINT_CHANNELS,
        hint_strides: Sequence[int] | None = None,
    ) -> "ControlNet":
        """A ControlNet whose encoder is a trainable copy of the U-Net's, on the U-Net's device
        (Section 3.1 of the paper)."""
        with unet.device:
            control = cls(unet.config, hint_channels, hint_strides)
        for part in ("conv_in", "time_embedding", "down_blocks", "mid_block"):
            getattr(control, part).load_state_dict(getattr(unet, part).state_dict())
        return control

    def forward(self, x_t: Tensor, hint: Tensor, t: Tensor, context: Tensor) -> list[Tensor]:
        """One residual for each skip of the encoder, then the middle's: 12 + 1 for Stable
        Diffusion.

        Raises InputError if the hint's size does not fit the latents'.
        """
        self._check_sizes(x_t, hint)
        emb = self.time_embedding(self.time_proj(t).to(x_t.dtype))  # [N, E]
        h = self.conv_in(x_t) + self._run(self.controlnet_cond_embedding, hint)  # [N, width, h, w]
        skips = [h]
        for block in self.down_blocks:
            h, outputs = self._run(block, h, emb, **_text(block, context))
            skips += outputs
        h = self._run(self.mid_block, h, emb, **_text(self.mid_block, context))
        residuals = [
            conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)
        ]
        return [*residuals, self.controlnet_mid_block(h)]

    @property
    def num_residuals(self) -> int:
        """How many residuals the network gives: the skips' and the middle's."""
        return len(self.controlnet_down_blocks) + 1

    @property
    def downscale(self) -> int:
        """How many pixels of the hint one latent spans, along each side."""
        return math.prod(self.hint_strides)

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Whether to keep only each block's input for the backward pass and to compute the rest
        again."""
        self.gradient_checkpointing = enabled

    def save(self, folder: Path) -> None:
        """Writes `config.json` and `diffusion_pytorch_model.safetensors`, which diffusers'
        ControlNetModel reads too.

        But for strides other than 2, which it ignores: it then computes residuals of another size.
        """
        make_folder(folder)
        save_tensors(Path(folder) / WEIGHTS_FILE, self.state_dict())
        write_json(Path(folder) / CONFIG_FILE, self.config)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as a diffusers ControlNet states it; `hint_strides` is there only where
        it is not all 2."""
        own = {} if set(self.hint_strides) == {2} else {"hint_strides": list(self.hint_strides)}
        return {
            "_class_name": CONTROL_CLASS,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in self.encoder_config.items()},
            "conditioning_channels": 3,
            "conditioning_embedding_out_channels": list(self.hint_channels),
            "controlnet_conditioning_channel_order": "rgb",
            **own,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ControlNet":
        """A new network of the configuration in a ControlNet's folder. Raises InputError if it
        describes none."""
        name = config.get("_class_name")
        if name != CONTROL_CLASS:
            raise InputError(f"the configuration is of a {name}, but {CONTROL_CLASS} is expected")
        try:
            channels = config.get("conditioning_embedding_out_channels", SD_HINT_CHANNELS)
            return cls(config, channels, config.get("hint_strides"))
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"the configuration does not describe a {CONTROL_CLASS} ({error})"
            ) from None

    @classmethod
    def load(cls, folder: Path) -> "ControlNet":
        """Rebuilds the network from its folder, in evaluation mode. Raises InputError if the folder
        does not hold one."""
        path = Path(folder) / CONFIG_FILE
        config = read_json(path)
        if not isinstance(config, dict):
            raise InputError(f"{path} does not describe a {CONTROL_CLASS}")
        control = cls.from_config(config)
        path = Path(folder) / WEIGHTS_FILE
        load_strict(control, load_tensors(path)[0], path)
        return control.eval()

    def _run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *args, use_reentrant=False, **kwargs)
        return module(*args, **kwargs)

    def _check_sizes(self, x_t: Tensor, hint: Tensor) -> None:
        expected = tuple(side * self.downscale for side in x_t.shape[-2:])
        if tuple(hint.shape) != (len(x_t), 3, *expected):
            raise InputError(
                f"latents of shape {list(x_t.shape)} need a hint of shape"
                f" {[len(x_t), 3, *expected]}, not {list(hint.shape)}"
            )


class HintEncoder(nn.Module):
    """Brings a hint [N, 3, H, W] to the latents' size: [N, width, h, w], zero at the start."""

    def __init__(self, channels: Sequence[int], strides: Sequence[int], width: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for a, b, stride in zip(channels, channels[1:], strides, strict=False):
            self.blocks += [
                nn.Conv2d(a, a, 3, padding=1),
                nn.Conv2d(a, b, 3, stride=stride, padding=1),
            ]
        self.conv_out = zero_conv(channels[-1], width, 3)

    def forward(self, hint: Tensor) -> Tensor:
        h = F.silu(self.conv_in(hint))
        for conv in self.blocks:
            h = F.silu(conv(h))
        return self.conv_out(h)


def zero_conv(channels_in: int, channels: int, kernel: int) -> nn.Conv2d:
    """A convolution that starts at zero, so that training starts from the frozen model (Section 3.1
    of the paper)."""
    conv = nn.Conv2d(channels_in, channels, kernel, padding=kernel // 2)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


def _new_encoder(config: Mapping[str, Any]) -> "UNet2DConditionModel":
    """A new U-Net of which only the encoder and the middle have weights; the decoder stays on the
    meta device."""
    from diffusers import UNet2DConditionModel

    strange = [key for key, value in FIXED.items() if config.get(key, value) != value]
    if strange:
        raise InputError(
            f"a ControlNet of Stable Diffusion's kind has no {strange[0]} = {config[strange[0]]!r}"
        )
    if config.get("mid_block_type", "UNetMidBlock2DCrossAttn") not in (
        "UNetMidBlock2DCrossAttn",
        "UNetMidBlock2D",
    ):
        raise InputError(
            "a ControlNet of Stable Diffusion's kind has no middle block"
            f" {config['mid_block_type']!r}"
        )
    values = {key: config[key] for key in ENCODER_KEYS if key in config}
    levels = len(values.get("down_block_types", (None,) * 4))
    device = torch.get_default_device()
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel(**values, up_block_types=("UpBlock2D",) * levels)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise InputError(f"the configuration does not describe a U-Net ({error})") from None
    for part in (unet.conv_in, unet.time_embedding, unet.down_blocks, unet.mid_block):
        empty = {
            key: torch.empty_like(value, device=device) for key, value in part.state_dict().items()
        }
        part.load_state_dict(empty, assign=True)
        part.apply(_reset)
    return unet


def _reset(module: nn.Module) -> None:
    reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
    if reset:
        reset()


def _skip_channels(width: int, down_blocks: nn.ModuleList) -> list[int]:
    """Channels of each skip: the first convolution's, then each layer's and each downsampling's."""
    channels = [width]
    for block in down_blocks:
        layers = [*block.resnets, *(block.downsamplers or [])]
        channels += [block.resnets[-1].out_channels] * len(layers)
    return channels


def _text(block: nn.Module, context: Tensor) -> dict[str, Tensor]:
    return (
        {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}
    )
