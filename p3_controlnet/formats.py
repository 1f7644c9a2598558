"""Reads ControlNets of Stable Diffusion v1.4 and of small base models from local files.

    model.controlnet = load_controlnet("control_sd15_canny.pth", model.unet)

`load_controlnet` lists the formats. Nothing is downloaded. `ControlNet.save` writes a ControlNet as
a diffusers folder.
"""

import functools
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
    unet_names,
)
from common.latent.stable_diffusion.sd14 import SD14, check_config
from common.latent.stable_diffusion.weights import Part, fill, own_names, read_folder, read_weights
from common.library_versions import defaults_of
from p3_controlnet.model import ENCODER_KEYS, ControlNet

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def load_controlnet(
    path: Path, unet: "UNet2DConditionModel", *, dtype: torch.dtype = torch.float32
) -> ControlNet:
    """Reads the ControlNet of the base network `unet`, in evaluation mode on the CPU.

    `path` is a diffusers folder or a single file. A file is a pickle or safetensors, with the key
    names of CompVis or of diffusers: lllyasviel's `control_model.*`, alone or in a whole cldm file,
    `{"state_dict": ...}`, `{"controlnet_state_dict": ...}`, `{"control_model": ...}` or the bare
    weights. A file has no configuration, so that of `unet` is used. Raises InputError if weights
    are missing or do not fit, or if the ControlNet in a folder belongs to another base model.
    """
    path = Path(path)
    if path.is_dir():
        config, part = _folder_config(path / CONFIG_FILE, unet), Part(*read_folder(path), own_names)
    else:
        config, part = {**unet.config, "_class_name": CONTROL_CLASS}, _control_part(path)
    try:
        with torch.device("meta"):
            control = ControlNet.from_config(config)
    except InputError as error:
        raise InputError(f"{path} holds no ControlNet for this model: {error}") from None
    fill(control, part, dtype)
    return control.eval()


def _control_part(path: Path) -> Part:
    state = read_weights(path)
    prefix = CONTROL if any(key.startswith(CONTROL) for key in state) else ""
    state = {key: value for key, value in state.items() if key.startswith(prefix)}
    if prefix + HINT_COMPVIS in state:
        return Part(state, path, functools.partial(unet_names, prefix=prefix))
    if prefix + HINT_DIFFUSERS in state:
        return Part(state, path, lambda keys: {key: prefix + key for key in keys})
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
    config, sd = (read_json(path / CONFIG_FILE) for path in (Path(folder), SD14 / "unet"))
    return (
        list(config.get("block_out_channels", sd["block_out_channels"])) != sd["block_out_channels"]
    )
