"""Reads ControlNets of Stable Diffusion v1.4 and of small base models from local files.

    model.controlnet = load_controlnet("control_sd15_canny.pth", model.unet)

`load_controlnet` lists the formats. Nothing is downloaded. `ControlNet.save` writes a ControlNet as
a diffusers folder.
"""

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.errors import InputError
from common.files import read_json
from common.latent.stable_diffusion.naming import (
    CONFIG_FILE,
    CONTROL,
    CONTROL_CLASS,
    HINT_COMPVIS,
    HINT_DIFFUSERS,
    WEIGHTS_FILE,
    unet_names,
)
from common.latent.stable_diffusion.sd14 import SD14, check_config
from common.latent.stable_diffusion.weights import Part, fill, own_names
from common.versions import defaults_of
from common.weights import followed, read_folder, read_weights, weight_names
from p3_controlnet.model import ENCODER_KEYS, ControlNet

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


FOREIGN = (
    (r"lora_controlnet$", "a ControlLoRA, whose weights are low-rank changes of a U-Net"),
    (r".*(lora_down|lora_up|lora_A|lora_B)\.|lora_unet_", "a LoRA"),
    (r"lllite_", "a ControlNet-LLLite"),
    (r"(adapter\.)?body\.\d", "a T2I-Adapter"),
    (r"image_proj\.|ip_adapter\.", "an IP-Adapter"),
    (r"control_add_embedding\.|task_embedding$", "a ControlNet-Union for Stable Diffusion XL"),
    (r"add_embedding\.|(control_model\.)?label_emb\.", "a ControlNet for Stable Diffusion XL"),
    (r"controlnet_x_embedder\.|controlnet_blocks\.", "a ControlNet for Stable Diffusion 3 or Flux"),
    (r"down_blocks\.\d+\.motion_modules\.", "a SparseCtrl for AnimateDiff"),
    (r".*(ctrl_to_base|base_to_ctrl)", "a ControlNet-XS"),
)
"""Names of weights in the files of other networks that control a U-Net, and what they are."""
TEXT_WIDTHS = {1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
DIFFERENCE = "difference"
"""The tensor by which the web UI's extension marks a file of differences from the base's weights.
"""


def load_controlnet(
    path: Path, unet: "UNet2DConditionModel", *, dtype: torch.dtype = torch.float32
) -> ControlNet:
    """Reads the ControlNet of the base network `unet`, in evaluation mode on the CPU.

    `path` is a diffusers folder or a single file. A file is a pickle or safetensors, in any
    precision, with the key names of CompVis or of diffusers: lllyasviel's `control_model.*`, alone
    or in a whole cldm file, or the bare weights, or their differences from the base's weights. A
    file has no configuration, so that of `unet` is used. Raises InputError if weights are missing
    or do not fit, if the ControlNet belongs to another base model, or if it is another kind of
    network, such as a ControlLoRA.
    """
    path = folder_of(path)
    if path.is_dir():
        config = _folder_config(path / CONFIG_FILE, unet)
        part, differs = Part(*read_folder(path), own_names), False
    else:
        config = {**unet.config, "_class_name": CONTROL_CLASS}
        part, differs = _control_part(path, unet.config["cross_attention_dim"])
    try:
        with torch.device("meta"):
            control = ControlNet.from_config(config)
    except InputError as error:
        raise InputError(f"{path} holds no ControlNet for this model: {error}") from None
    fill(control, part, dtype)
    if differs:
        base = unet.state_dict()
        for name, value in control.state_dict().items():
            if name in base:
                value += base[name].to(value)
    return control.eval()


def folder_of(path: Path) -> Path:
    """A ControlNet's path; that of its folder for the weights of a folder written by `save`."""
    path = followed(path)
    beside = path.parent / CONFIG_FILE
    if path.name != WEIGHTS_FILE or not (path.is_file() and beside.is_file()):
        return path
    config = read_json(beside)
    ours = isinstance(config, dict) and config.get("_class_name") == CONTROL_CLASS
    return path.parent if ours else path


def refuse_foreign(path: Path) -> None:
    """Raises InputError that names the kind of network if a file holds one of those in FOREIGN."""
    names = weight_names(path) if Path(path).is_file() else []
    for pattern, name in FOREIGN:
        if any(re.match(pattern, key) for key in names):
            raise InputError(f"{path} is {name}: a ControlNet for Stable Diffusion v1 is expected")


def _control_part(path: Path, text_width: int) -> tuple[Part, bool]:
    """The ControlNet's weights in a file, and whether they are differences from the base's."""
    refuse_foreign(path)
    state = read_weights(path)
    prefix = CONTROL if any(key.startswith(CONTROL) for key in state) else ""
    differs = state.pop(f"{prefix}{DIFFERENCE}", state.pop(DIFFERENCE, None)) is not None
    state = {key: value for key, value in state.items() if key.startswith(prefix)}
    widths = {
        v.shape[1] for k, v in state.items() if k.endswith(".attn2.to_k.weight") and v.dim() > 1
    }
    if widths and widths != {text_width}:
        width = widths.pop()
        name = TEXT_WIDTHS.get(width, "another base model")
        raise InputError(
            f"{path} is a ControlNet for {name}: its text features are {width} wide, but"
            f" {text_width} are expected"
        )
    if prefix + HINT_COMPVIS in state:
        return Part(state, path, functools.partial(unet_names, prefix=prefix)), differs
    if prefix + HINT_DIFFUSERS in state:
        names = Part(state, path, lambda keys: {key: prefix + key for key in keys})
        return names, differs
    raise InputError(
        f"{path} holds no ControlNet: neither {CONTROL}{HINT_COMPVIS} nor {HINT_DIFFUSERS} is among"
        " its keys"
    )


def _folder_config(path: Path, unet: "UNet2DConditionModel") -> dict[str, Any]:
    """Reads the configuration of a ControlNet in a diffusers folder.

    Raises InputError if its encoder differs from that of `unet`.
    """
    from diffusers import ControlNetModel

    base = {key: unet.config[key] for key in ENCODER_KEYS}
    return check_config(path, base, defaults_of(ControlNetModel), base, "of another base model")


def is_small(folder: Path) -> bool:
    """Whether the ControlNet in a folder belongs to a small base model.

    It does if its `block_out_channels` differ from Stable Diffusion's.
    """
    config, sd = (read_json(path / CONFIG_FILE) for path in (followed(folder), SD14 / "unet"))
    return (
        list(config.get("block_out_channels", sd["block_out_channels"])) != sd["block_out_channels"]
    )
