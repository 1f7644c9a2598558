"""CompVis' names of Stable Diffusion's weights, derived from those of diffusers and transformers.

Each `*_names` function takes the keys of a network's state dict and returns {own key: CompVis key},
one to one, for any width and depth of the network; swapping keys and values gives the other
direction. Rules replace a table of 1,170 keys. The prefixes are CompVis' too:
`model.diffusion_model.`, `first_stage_model.`, `cond_stage_model.`, and cldm's `control_model.`.
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from common.errors import InputError
from common.versions import TEXT_PREFIX

Names = dict[str, str]
State = dict[str, Tensor]

UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT = "cond_stage_model.transformer."
CONTROL = "control_model."
EMA = "model_ema."

# A ControlNet is recognised by the first weight of its hint encoder, or by the class in its
# folder's configuration.
HINT_COMPVIS = "input_hint_block.0.weight"
HINT_DIFFUSERS = "controlnet_cond_embedding.conv_in.weight"
CONTROL_CLASS = "ControlNetModel"

# Files in the folders of diffusers.
CONFIG_FILE = "config.json"
SCHEDULER_FILE = "scheduler_config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

# Names that do not depend on the number of levels and layers.
_UNET_ENDS = (
    ("conv_in.", "input_blocks.0.0."),
    ("time_embedding.linear_1.", "time_embed.0."),
    ("time_embedding.linear_2.", "time_embed.2."),
    ("mid_block.resnets.0.", "middle_block.0."),
    ("mid_block.attentions.0.", "middle_block.1."),
    ("mid_block.resnets.1.", "middle_block.2."),
    ("conv_norm_out.", "out.0."),
    ("conv_out.", "out.2."),
    ("controlnet_mid_block.", "middle_block_out.0."),
)
_UNET_RESNET = (
    ("norm1.", "in_layers.0."),
    ("conv1.", "in_layers.2."),
    ("time_emb_proj.", "emb_layers.1."),
    ("norm2.", "out_layers.0."),
    ("conv2.", "out_layers.3."),
    ("conv_shortcut.", "skip_connection."),
)
_VAE_PARTS = (
    (".conv_norm_out.", ".norm_out."),
    (".conv_shortcut.", ".nin_shortcut."),
    (".mid_block.resnets.0.", ".mid.block_1."),
    (".mid_block.resnets.1.", ".mid.block_2."),
    (".mid_block.attentions.0.", ".mid.attn_1."),
    (".attn_1.group_norm.", ".attn_1.norm."),
    (".attn_1.to_q.", ".attn_1.q."),
    (".attn_1.to_k.", ".attn_1.k."),
    (".attn_1.to_v.", ".attn_1.v."),
    (".attn_1.to_out.0.", ".attn_1.proj_out."),
)
_BLOCK = re.compile(
    r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
_ONE_BY_ONE = re.compile(r"\.attn_1\.(q|k|v|proj_out)\.weight$")


def unet_names(keys: Iterable[str], prefix: str = UNET) -> Names:
    """CompVis' names of a U-Net's weights or, with the prefix `CONTROL`, of a ControlNet's.

    CompVis numbers all blocks of the encoder, and those of the decoder, consecutively. A
    downsampling layer is a block of its own; an upsampling layer is the last part of the block
    before it. In a block, part 0 is the residual block, and part 1 the attention if there is one.
    """
    keys = list(keys)
    layers = sum(
        bool(re.fullmatch(r"down_blocks\.0\.resnets\.\d+\.conv1\.weight", key)) for key in keys
    )
    hints = sum(
        bool(re.fullmatch(r"controlnet_cond_embedding\.blocks\.\d+\.weight", key)) for key in keys
    )
    attending = {
        int(found[1]) for key in keys if (found := re.match(r"up_blocks\.(\d+)\.attentions\.", key))
    }
    return {key: prefix + _unet_name(key, layers, hints, attending) for key in keys}


def _unet_name(key: str, layers: int, hints: int, attending: set[int]) -> str:
    if ".resnets." in key:
        key = _replaced(key, _UNET_RESNET)
    for ours, theirs in _UNET_ENDS:
        if key.startswith(ours):
            return theirs + key[len(ours) :]
    if found := re.match(r"controlnet_down_blocks\.(\d+)\.(.+)", key):
        return f"zero_convs.{found[1]}.0.{found[2]}"
    if found := re.match(r"controlnet_cond_embedding\.(conv_in|conv_out|blocks\.(\d+))\.(.+)", key):
        # Convolutions and activations alternate, so convolution k is layer 2k.
        place = {"conv_in": 0, "conv_out": hints + 1}.get(found[1], int(found[2] or 0) + 1)
        return f"input_hint_block.{2 * place}.{found[3]}"
    if not (found := _BLOCK.fullmatch(key)):
        raise InputError(f"the weight {key} has no name in CompVis' format")
    half, level, part, number, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    first = level * (layers + 1)
    if part == "downsamplers":
        return f"input_blocks.{1 + first + layers}.0.{rest.replace('conv.', 'op.')}"
    if part == "upsamplers":
        return f"output_blocks.{first + layers}.{2 if level in attending else 1}.{rest}"
    row = (
        f"input_blocks.{1 + first + number}"
        if half == "down"
        else f"output_blocks.{first + number}"
    )
    return f"{row}.{1 if part == 'attentions' else 0}.{rest}"


def vae_names(keys: Iterable[str], prefix: str = VAE) -> Names:
    """CompVis' names of an autoencoder's weights.

    CompVis counts the decoder's levels from the finest.
    """
    keys = list(keys)
    levels = 1 + max(
        (int(found[1]) for key in keys if (found := re.match(r"decoder\.up_blocks\.(\d+)\.", key))),
        default=0,
    )
    return {key: prefix + _vae_name(key, levels) for key in keys}


def _vae_name(key: str, levels: int) -> str:
    key = re.sub(r"\.down_blocks\.(\d+)\.", r".down.\1.", key)
    key = re.sub(r"\.up_blocks\.(\d+)\.", lambda found: f".up.{levels - 1 - int(found[1])}.", key)
    key = re.sub(r"(\.(?:down|up)\.\d+)\.resnets\.", r"\1.block.", key)
    key = re.sub(r"\.(down|up)samplers\.0\.", r".\1sample.", key)
    return _replaced(key, _VAE_PARTS)


def text_encoder_names(keys: Iterable[str], prefix: str = TEXT + TEXT_PREFIX) -> Names:
    """CompVis' names of the text encoder's weights.

    With a `text_prefix` alone as `prefix` they are the names in transformers' files.
    """
    return {key: prefix + key.removeprefix(TEXT_PREFIX) for key in keys}


def ema_names(keys: Iterable[str]) -> Names:
    """CompVis' names of a U-Net's averaged weights, which contain no full stops."""
    names = unet_names(keys, "diffusion_model.")
    return {key: EMA + theirs.replace(".", "") for key, theirs in names.items()}


def _replaced(key: str, rules: Iterable[tuple[str, str]]) -> str:
    for ours, theirs in rules:
        key = key.replace(ours, theirs)
    return key


def linear_attention(state: Mapping[str, Tensor]) -> State:
    """CompVis' weights with the autoencoder's attention as linear layers [C, C], as in diffusers.

    CompVis stores these layers as 1x1 convolutions [C, C, 1, 1].
    """
    return {
        key: value[:, :, 0, 0] if _ONE_BY_ONE.search(key) and value.shape[2:] == (1, 1) else value
        for key, value in state.items()
    }
