"""Loading a base model of either kind: Stable Diffusion v1.4 or a small model of this project."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import nn

from common.checkpoint import state_hash
from common.errors import InputError
from common.files import read_json
from common.latent import small as small_diffusion
from common.latent.model import LatentDiffusion
from common.latent.stable_diffusion.load import load_stable_diffusion
from common.latent.stable_diffusion.naming import (
    CONFIG_FILE,
    CONTROL,
    CONTROL_CLASS,
    HINT_COMPVIS,
    HINT_DIFFUSERS,
    UNET,
)
from common.weights import followed, weight_names

Kind = Literal["sd_file", "sd_folder", "controlnet", "small", "unknown"]


def load_base(path: Path) -> LatentDiffusion:
    """The base model at `path`, without a ControlNet, on the CPU.

    Raises InputError if it is neither Stable Diffusion v1.4 nor a model folder of this project, and
    as `load_stable_diffusion` does.
    """
    path = followed(path)
    kind = kind_of(path)
    if kind == "small":
        return small_diffusion.load_model(path)
    if kind in ("sd_file", "sd_folder") or kind == "controlnet" and holds_base(path):
        return load_stable_diffusion(path)
    what = "a ControlNet without its base model" if kind == "controlnet" else "no base model"
    raise InputError(
        f"{path} is {what}: Stable Diffusion v1.4 or a model folder of this project is expected"
    )


def kind_of(path: Path) -> Kind:
    """The kind of a checkpoint, from its keys or its folder's files; its values are not read.

    - "sd_file", "sd_folder": Stable Diffusion. `load_stable_diffusion` checks whether it is v1.
    - "controlnet": a file or folder of a ControlNet, or a whole cldm file, which also holds the
      base model.
    - "small": a model folder of this project, such as checkpoints/ldm_shapes.
    - "unknown": something else.

    Raises InputError if `path` does not exist, or is a file that is damaged or would run code.
    """
    path = followed(path)
    if path.is_dir():
        return _kind_of_folder(path)
    names = {key.removeprefix(CONTROL) for key in weight_names(path)}
    if names & {HINT_COMPVIS, HINT_DIFFUSERS}:
        return "controlnet"
    return "sd_file" if any(name.startswith(UNET) for name in names) else "unknown"


def _kind_of_folder(folder: Path) -> Kind:
    config = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else None
    config = config if isinstance(config, Mapping) else {}
    # Checked first, because such a folder has unet/ and vae/ too.
    if config.get("kind") == small_diffusion.KIND:
        return "small"
    if all((folder / part / CONFIG_FILE).is_file() for part in ("unet", "vae")):
        return "sd_folder"
    return "controlnet" if config.get("_class_name") == CONTROL_CLASS else "unknown"


def holds_base(path: Path) -> bool:
    """Whether the ControlNet at `path` is a whole cldm file, which also holds the base's U-Net."""
    return not Path(path).is_dir() and any(key.startswith(UNET) for key in weight_names(Path(path)))


def base_hash(model: LatentDiffusion) -> str:
    """A hash of the frozen networks, which identifies a base model in results."""
    return state_hash(nn.ModuleList([model.unet, model.autoencoder, model.text_encoder]))
