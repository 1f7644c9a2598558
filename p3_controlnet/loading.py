"""The model that a program draws with: a base of any kind and the ControlNet that goes with it."""

import dataclasses
import os
from pathlib import Path

from common.devices import DeviceName
from common.errors import InputError
from common.files import ROOT
from common.latent.load import holds_base, kind_of, load_base
from common.latent.model import LatentDiffusion
from p3_controlnet.formats import is_small, load_controlnet

SHIPPED_BASE = ROOT / "checkpoints" / "ldm_shapes"
SHIPPED_CONTROL = ROOT / "checkpoints" / "controlnet_circles"
SD_CONTROL = ROOT / "checkpoints" / "controlnet_sd14"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which base model and which ControlNet to draw with, and where."""

    checkpoint: Path = SHIPPED_BASE
    """Stable Diffusion v1.4 file or folder, ControlNet file or folder, or the folder of the small
    model."""
    base: Path | None = None
    """The base of a ControlNet given as checkpoint; the default is $SD_BASE, for a small one the
    shipped small model."""
    control: Path | None = None
    """The ControlNet of a base given as checkpoint; the default is the shipped one."""
    device: DeviceName = "auto"
    """Where to compute; auto takes CUDA if present."""


def load_model(config: ModelConfig) -> LatentDiffusion:
    """The base and the ControlNet that the checkpoint stands for. Raises InputError if it is of no
    known kind."""
    checkpoint = config.checkpoint
    _check_shipped(checkpoint)
    kind = kind_of(checkpoint)
    if kind == "unknown":
        raise InputError(
            f"{checkpoint} is no Stable Diffusion v1.4, no ControlNet and no model folder of this"
            " project: nothing to draw with"
        )
    if kind == "controlnet":
        if config.control:
            raise InputError(
                f"{checkpoint} is a ControlNet itself, so --control {config.control} has no place"
            )
        return with_control(find_base(checkpoint, config.base), checkpoint)
    if config.base:
        raise InputError(
            f"{checkpoint} is a base model itself, so --base {config.base} has no place"
        )
    if kind == "small":
        return with_control(checkpoint, config.control or SHIPPED_CONTROL)
    if config.control or SD_CONTROL.is_dir():
        return with_control(checkpoint, config.control or SD_CONTROL)
    print(
        f"there is no ControlNet for Stable Diffusion in checkpoints/{SD_CONTROL.name}, so the"
        f" pictures are drawn by the project's small model, checkpoints/{SHIPPED_BASE.name} with"
        f" checkpoints/{SHIPPED_CONTROL.name}"
    )
    return with_control(SHIPPED_BASE, SHIPPED_CONTROL)


def find_base(control: Path, base: Path | None) -> Path:
    """The base of a ControlNet: the one given, the file itself if it holds one, $SD_BASE, or for a
    small one the small model."""
    if base is not None:
        return base
    if control.is_dir() and is_small(control):
        return SHIPPED_BASE
    if holds_base(control):
        return control
    if given := os.environ.get("SD_BASE"):
        return Path(given)
    raise InputError(
        f"{control} is a ControlNet, which needs the Stable Diffusion v1.4 that it was trained on: "
        "name it with --base or in the environment variable SD_BASE"
    )


def with_control(base: Path, control: Path) -> LatentDiffusion:
    """A base model with a ControlNet in its slot."""
    for path in (base, control):
        _check_shipped(path)
    model = load_base(base)
    model.controlnet = load_controlnet(control, model.unet)
    return model


def _check_shipped(path: Path) -> None:
    if path.resolve() in (SHIPPED_BASE, SHIPPED_CONTROL) and not path.is_dir():
        raise InputError(
            f"checkpoints/{path.name} is missing; it is part of the repository: restore it with git"
        )
