"""Loads the model that a program draws with: a base model and its ControlNet."""

import dataclasses
import os
import shlex
from pathlib import Path

from common.devices import DTYPES, DeviceName, Precision
from common.errors import InputError
from common.files import ROOT
from common.latent.load import holds_base, kind_of, load_base
from common.latent.model import LatentDiffusion
from common.latent.stable_diffusion.naming import CONFIG_FILE
from common.weights import followed, say
from p3_controlnet.formats import folder_of, is_small, load_controlnet, refuse_foreign

SHIPPED_BASE = ROOT / "checkpoints" / "ldm_shapes"
SHIPPED_CONTROL = ROOT / "checkpoints" / "controlnet_circles"
SD_CONTROL = ROOT / "checkpoints" / "controlnet_sd14"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The base model and the ControlNet to draw with, and the device."""

    checkpoint: Path = SHIPPED_BASE
    """Base model or ControlNet: a Stable Diffusion v1.4 file or folder, a ControlNet file or
    folder, or the folder of the small model."""
    base: Path | None = None
    """Base model, if --checkpoint is a ControlNet. By default: for a small ControlNet the shipped
    small model; otherwise the checkpoint itself if it holds its base too, else $SD_BASE."""
    control: Path | None = None
    """ControlNet, if --checkpoint is a base model. By default the one in the base's own folder;
    else checkpoints/controlnet_circles for a small base model, and for Stable Diffusion $CONTROLNET
    if it is set, else checkpoints/controlnet_sd14."""
    device: DeviceName = "auto"
    """Device to compute on; auto is CUDA if present, else MPS, else the CPU."""
    precision: Precision = "fp32"
    """Floating-point format of U-Net, ControlNet and text encoder; the autoencoder decodes in
    float32 always, because its activations can exceed what fp16 holds. Default fp32: pictures then
    agree on all devices, and the small model gains nothing from less. For Stable Diffusion on a GPU
    fp16 (or bf16, which cannot overflow and is coarser) takes half the memory and about half the
    time."""


def load_model(config: ModelConfig, *, instead: bool = True) -> LatentDiffusion:
    """Loads the base model and the ControlNet that the configuration names, in its precision.

    If the checkpoint is Stable Diffusion and no ControlNet for it is given or present, loads the
    shipped small model and its ControlNet instead and prints that it does, with the command that
    trains one; with `instead` False that is an error. Raises InputError if the checkpoint is of no
    known kind, or if `base` or `control` does not apply to it.
    """
    return _load_float32(config, instead).cast(DTYPES[config.precision])


def _load_float32(config: ModelConfig, instead: bool) -> LatentDiffusion:
    checkpoint = config.checkpoint
    _check_shipped(checkpoint)
    kind = kind_of(checkpoint)
    if kind == "unknown":
        refuse_foreign(checkpoint)
        raise InputError(
            f"{checkpoint} is neither a Stable Diffusion v1.4 model, nor a ControlNet, nor a model"
            " folder of this project: name one of these with --checkpoint"
        )
    if kind == "controlnet":
        if config.control:
            raise InputError(
                f"{checkpoint} is a ControlNet itself, so --control {config.control} does not"
                " apply: leave it out"
            )
        return with_control(find_base(checkpoint, config.base), checkpoint)
    if config.base:
        raise InputError(
            f"{checkpoint} is a base model itself, so --base {config.base} does not apply: leave it"
            " out"
        )
    if kind == "small":
        control = config.control or _control_inside(checkpoint) or SHIPPED_CONTROL
        return with_control(checkpoint, control)
    if control := config.control or _control_inside(checkpoint) or _sd_control():
        return with_control(checkpoint, control)
    training = f"--preset sd14 --base {shlex.quote(str(checkpoint))} --fill50k hw2_data/fill50k"
    missing = (
        f"there is no ControlNet for Stable Diffusion in checkpoints/{SD_CONTROL.name} or"
        f" $CONTROLNET (`bash scripts/train_controlnet.sh {training}` trains one)"
    )
    if not instead:
        raise InputError(missing)
    print(
        f"{missing}, so the project's small model is used instead: checkpoints/{SHIPPED_BASE.name}"
        f" with checkpoints/{SHIPPED_CONTROL.name}"
    )
    return with_control(SHIPPED_BASE, SHIPPED_CONTROL)


def _control_inside(base: Path) -> Path | None:
    """The ControlNet in the folder of a base model, as of diffusers' pipeline, or None.

    Raises InputError if the folder holds several.
    """
    found = sorted(
        path.parent
        for path in followed(base).glob(f"controlnet*/{CONFIG_FILE}")
        if path.parent.is_dir()
    )
    if len(found) > 1:
        raise InputError(
            f"{base} holds several ControlNets ({', '.join(path.name for path in found)}): name one"
            " with --control"
        )
    if found:
        say(f"the ControlNet is that in {found[0]}")
    return found[0] if found else None


def _sd_control() -> Path | None:
    """The ControlNet for Stable Diffusion: $CONTROLNET or the folder in checkpoints/, if any."""
    if given := os.environ.get("CONTROLNET"):
        if not Path(given).exists():
            raise InputError(f"the ControlNet {given}, named by $CONTROLNET, does not exist")
        return Path(given)
    return SD_CONTROL if SD_CONTROL.is_dir() else None


def find_base(control: Path, base: Path | None) -> Path:
    """The path of a ControlNet's base model.

    The first of these that applies: `base` if given, the shipped small model for a small
    ControlNet, the file `control` itself if it holds a base model too, $SD_BASE. Raises InputError
    if none applies.
    """
    if base is not None:
        return base
    if (folder := folder_of(control)).is_dir() and is_small(folder):
        return SHIPPED_BASE
    if holds_base(control):
        return control
    if given := os.environ.get("SD_BASE"):
        return Path(given)
    raise InputError(
        f"{control} is a ControlNet, which needs the Stable Diffusion v1.4 model that it was"
        " trained on: name it with --base or in the environment variable SD_BASE"
    )


def with_control(base: Path, control: Path) -> LatentDiffusion:
    """Loads a base model and the ControlNet for it, which becomes its `controlnet`, frozen."""
    for path in (base, control):
        _check_shipped(path)
    model = load_base(base)
    model.controlnet = load_controlnet(control, model.unet).requires_grad_(False)
    return model


def _check_shipped(path: Path) -> None:
    if path.resolve() in (SHIPPED_BASE, SHIPPED_CONTROL) and not path.is_dir():
        raise InputError(
            f"checkpoints/{path.name} is missing; it is part of the repository: restore it with git"
        )
