"""ControlNets of Stable Diffusion v1.4 and of small base models, from the files that are in
circulation, without a network.

    model.controlnet = load_controlnet("control_sd15_canny.pth", model.unet)

A ControlNet is saved as a diffusers folder by its own `save`.
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
    """The ControlNet of the base network `unet`, in evaluation mode on the CPU, from a diffusers
    folder or a single file.

    A file is a pickle or safetensors in CompVis' or diffusers' names: lllyasviel's
    `control_model.*`, alone or in a whole cldm file, `{"state_dict": ...}`,
    `{"controlnet_state_dict": ...}`, `{"control_model": ...}` or the bare weights. Its
    configuration is the base's. Raises InputError on weights that do not fit, and if a folder's
    ControlNet is of another base.
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
        f"{path} holds no ControlNet: neither {CONTROL}{HINT_COMPVIS} nor {HINT_DIFFUSERS} is in it"
    )


def _folder_config(path: Path, unet: "UNet2DConditionModel") -> dict[str, Any]:
    """The configuration of a ControlNet in a diffusers folder. Raises InputError if its encoder is
    not that of `unet`."""
    from diffusers import ControlNetModel

    base = {key: unet.config[key] for key in ENCODER_KEYS}
    return check_config(path, base, defaults_of(ControlNetModel), base, "of another base model")


def is_small(folder: Path) -> bool:
    """Whether the ControlNet in a folder is of other widths than Stable Diffusion's, so for a small
    base model."""
    config, sd = (read_json(path / CONFIG_FILE) for path in (Path(folder), SD14 / "unet"))
    return (
        list(config.get("block_out_channels", sd["block_out_channels"])) != sd["block_out_channels"]
    )
