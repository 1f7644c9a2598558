"""ControlNet (Zhang et al. 2023, arXiv:2302.05543), a trainable branch beside a frozen U-Net.

A ControlNet is a trainable copy of the U-Net's encoder. It reads a control image (the hint) and
returns residuals for the U-Net's skip connections and middle block. The frozen U-Net, to which they
are added, is in `common/latent/model.py`. The keys of the state dict, and the folder that `save`
writes, are those of diffusers' `ControlNetModel`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from common.checkpoint import build_network, load_strict, save_tensors
from common.config import read_entries
from common.errors import InputError
from common.files import make_folder, write_json
from common.latent.control import ControlText
from common.latent.network_config import NETWORK
from common.latent.stable_diffusion.naming import CONFIG_FILE, CONTROL_CLASS, WEIGHTS_FILE
from common.weights import read_weights

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

SD_HINT_CHANNELS = (16, 32, 96, 256)  # of Stable Diffusion's hint encoder

# The configuration keys that define the encoder and the middle block. diffusers uses the same names
# for its U-Net and its ControlNet.
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
# Options of diffusers that are supported only at these values, which Stable Diffusion uses.
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
    """Computes control residuals from noisy latents, a control image (hint), timestep and text.

    `unet_config` is the configuration of the base U-Net (`unet.config`) or the `config.json` of a
    diffusers ControlNet; only the keys in ENCODER_KEYS and FIXED are read. `hint_channels` are the
    channels of the hint encoder (default: Stable Diffusion's). From each entry to the next, the
    hint's height and width are divided by the matching entry of `hint_strides` (default: 2 each,
    the only value that diffusers supports). The product of the strides must be the number of pixels
    per latent along each side, 8 for Stable Diffusion. `control_text` states the text that the
    network is trained with: "full", the picture's prompt, or "empty", the empty prompt always. A
    ControlNet without text learns where things are and leaves to the base model what they are.

    The weights are randomly initialised, those of the zero convolutions with zeros. Use `from_unet`
    to start a training and `load` to read a trained network. Raises InputError if the configuration
    asks for an option that Stable Diffusion's networks do not have.
    """

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        hint_channels: Sequence[int] = SD_HINT_CHANNELS,
        hint_strides: Sequence[int] | None = None,
        control_text: ControlText = "full",
    ) -> None:
        super().__init__()
        if control_text not in get_args(ControlText):
            raise InputError(f"control_text must be full or empty, not {control_text!r}")
        hint_strides = tuple(hint_strides or (2,) * (len(hint_channels) - 1))
        if len(hint_channels) < 2 or len(hint_strides) != len(hint_channels) - 1:
            raise InputError(
                "a hint encoder needs at least two channels and one stride fewer than channels, but"
                f" the channels are {list(hint_channels)} and the strides {list(hint_strides)}"
            )
        self.hint_channels, self.hint_strides = tuple(hint_channels), hint_strides
        self.control_text = control_text
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
        """A ControlNet whose encoder is a trainable copy of the U-Net's, on the U-Net's device.

        See Section 3.1 of the paper.
        """
        with unet.device:
            control = cls(unet.config, hint_channels, hint_strides)
        for part in ("conv_in", "time_embedding", "down_blocks", "mid_block"):
            getattr(control, part).load_state_dict(getattr(unet, part).state_dict())
        return control

    def encode_hint(self, hint: Tensor) -> Tensor:
        """Features [N, width, h, w] of a hint [N, 3, H, W] in [0, 1]; they do not depend on t."""
        return self._run(self.controlnet_cond_embedding, hint)

    def forward(
        self,
        x_t: Tensor,
        hint: Tensor,
        t: Tensor,
        context: Tensor,
        hint_features: Tensor | None = None,
    ) -> list[Tensor]:
        """Control residuals: one for each skip connection, then one for the middle block.

        `x_t` is [N, C, h, w], `hint` [N, 3, H, W] in [0, 1], `t` long [N] and `context` [N, L, D];
        `hint_features` are those of `encode_hint`, if they are known already. Stable Diffusion has
        12 + 1 residuals. Raises InputError if the hint's size does not match the latents'.
        """
        self._check_sizes(x_t, hint)
        emb = self.time_embedding(self.time_proj(t).to(x_t.dtype))  # [N, E]
        h = self.conv_in(x_t)  # [N, width, h, w]
        h = h + (self.encode_hint(hint) if hint_features is None else hint_features)
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
        """Number of residuals: one for each skip connection and one for the middle block."""
        return len(self.controlnet_down_blocks) + 1

    @property
    def downscale(self) -> int:
        """Pixels of the hint per latent, along each side."""
        return math.prod(self.hint_strides)

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Turns gradient checkpointing on or off.

        When on, only the input of each block is stored for the backward pass, which computes the
        block's activations again. This saves memory and costs time.
        """
        self.gradient_checkpointing = enabled

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes `config.json`, and the weights, in `dtype`, to the folder.

        diffusers' ControlNetModel reads the folder too, but only if all strides are 2: it ignores
        `hint_strides`, so with other strides its residuals have another size.
        """
        make_folder(folder)
        state = {name: value.to(dtype) for name, value in self.state_dict().items()}
        save_tensors(Path(folder) / WEIGHTS_FILE, state)
        write_json(Path(folder) / CONFIG_FILE, self.config)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration, with the keys of a diffusers ControlNet.

        The additional keys `hint_strides` and `control_text` are present only if a stride is not 2
        or the text is not "full".
        """
        own: dict[str, Any] = {}
        if set(self.hint_strides) != {2}:
            own["hint_strides"] = list(self.hint_strides)
        if self.control_text != "full":
            own["control_text"] = self.control_text
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
        """A newly initialised network from the configuration in a ControlNet's folder.

        Raises InputError if it is not the configuration of a ControlNet.
        """
        name = config.get("_class_name")
        if name != CONTROL_CLASS:
            raise InputError(f"the configuration's _class_name is {name}, not {CONTROL_CLASS}")
        try:
            channels = config.get("conditioning_embedding_out_channels", SD_HINT_CHANNELS)
            return cls(
                config, channels, config.get("hint_strides"), config.get("control_text", "full")
            )
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"the configuration does not describe a {CONTROL_CLASS} ({error})"
            ) from None

    @classmethod
    def load(cls, folder: Path) -> "ControlNet":
        """Reads a network from the folder that `save` wrote, in evaluation mode.

        Raises InputError if a file is missing or does not fit a ControlNet.
        """
        path = Path(folder) / CONFIG_FILE
        config = read_entries(path, NETWORK)
        weights = Path(folder) / WEIGHTS_FILE
        control = build_network(
            lambda: cls.from_config(config), path, f"a {CONTROL_CLASS}", weights
        )
        load_strict(control, read_weights(weights), weights)
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
    """Encodes a hint [N, 3, H, W] to features [N, width, h, w]; all zero at initialisation."""

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
        """Features [N, width, h, w] of a hint [N, 3, H, W] in [0, 1]."""
        h = F.silu(self.conv_in(hint))
        for conv in self.blocks:
            h = F.silu(conv(h))
        return self.conv_out(h)


def zero_conv(channels_in: int, channels: int, kernel: int) -> nn.Conv2d:
    """A convolution whose weights and biases are initialised with zeros.

    All control residuals are then zero, so training starts from the frozen model's own output
    (Section 3.1 of the paper).
    """
    conv = nn.Conv2d(channels_in, channels, kernel, padding=kernel // 2)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


def _new_encoder(config: Mapping[str, Any]) -> "UNet2DConditionModel":
    """A newly initialised U-Net whose decoder stays on the meta device, without memory.

    Raises InputError if the configuration is not supported or does not describe a U-Net.
    """
    from diffusers import UNet2DConditionModel

    unsupported = [key for key, value in FIXED.items() if config.get(key, value) != value]
    if unsupported:
        raise InputError(
            f"this ControlNet does not support {unsupported[0]} = {config[unsupported[0]]!r} in a"
            " configuration"
        )
    if config.get("mid_block_type", "UNetMidBlock2DCrossAttn") not in (
        "UNetMidBlock2DCrossAttn",
        "UNetMidBlock2D",
    ):
        raise InputError(
            f"this ControlNet does not support mid_block_type = {config['mid_block_type']!r} in a"
            " configuration"
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
    """Channels of each skip connection: first convolution, then each layer and downsampling."""
    channels = [width]
    for block in down_blocks:
        layers = [*block.resnets, *(block.downsamplers or [])]
        channels += [block.resnets[-1].out_channels] * len(layers)
    return channels


def _text(block: nn.Module, context: Tensor) -> dict[str, Tensor]:
    return (
        {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}
    )
