"""Stable Diffusion v1.4 and its ControlNets from the files that are in circulation, without a network.

    model = load_stable_diffusion("sd-v1-4.ckpt")  # or a .safetensors, or a diffusers folder
    model.controlnet = load_controlnet("control_sd15_canny.pth", model.unet)

A single file holds weights alone, so its configuration is v1.4's; a folder brings its own, which must be the same (`sd14.py`).
CompVis' names of the weights are in `naming.py`. A ControlNet is saved as a diffusers folder by its own `save`.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from common.checkpoint import load_pickle, load_strict, load_tensors, tensor_names
from common.errors import InputError
from common.files import read_json
from common.latent_diffusion import LatentDiffusion
from common.text import clip_tokenizer
from p3_controlnet.base.model import load_model
from p3_controlnet.model import CLASS_NAME, CONFIG_FILE, ControlNet
from p3_controlnet.naming import (
    CONTROL,
    EMA,
    TEXT,
    UNET,
    VAE,
    Names,
    State,
    ema_names,
    linear_attention,
    old_vae_names,
    text_encoder_names,
    to_compvis,
    unet_names,
    vae_names,
)
from p3_controlnet.sd14 import SD14, check_folder, check_table, control_config, empty_networks, noise_schedule

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

Kind = Literal["sd_file", "sd_folder", "controlnet", "small", "unknown"]
SMALL_KINDS = "p3_controlnet."
"""What the `kind` in the config.json of a model folder of this project begins with."""

_WRAPPERS = ("state_dict", "controlnet_state_dict", "control_model")
_WEIGHT_FILES = tuple(
    f"{stem}{variant}{suffix}"
    for suffix in ("safetensors", "bin")
    for variant in (".", ".fp16.")
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model")
)
_HINT_COMPVIS, _HINT_DIFFUSERS = "input_hint_block.0.weight", "controlnet_cond_embedding.conv_in.weight"


class _ModelCheckpoint:
    """Stands in for the class of Lightning that the published v1 files name as a key of their `callbacks`."""


_STUBS = ((_ModelCheckpoint, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),)


# ----------------------------------------------------------------------------
# What is it?


def kind_of(path: Path) -> Kind:
    """What a checkpoint is, from its keys or its folder's content; its values are not read.

    - "sd_file", "sd_folder": Stable Diffusion, for `load_stable_diffusion`, which finds out whether it is v1.
    - "controlnet": a file or folder for `load_controlnet`. A whole cldm file is one too; it holds its base as well.
    - "small": a model folder of this project, such as checkpoints/ldm_shapes.
    - "unknown": something else. Raises InputError if there is nothing at `path`, or a file that is damaged or would run code.
    """
    path = Path(path)
    if path.is_dir():
        return _kind_of_folder(path)
    names = {key.removeprefix(CONTROL) for key in _names(path) if isinstance(key, str)}
    if names & {_HINT_COMPVIS, _HINT_DIFFUSERS}:
        return "controlnet"
    return "sd_file" if any(name.startswith(UNET) for name in names) else "unknown"


def _kind_of_folder(folder: Path) -> Kind:
    config = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else None
    config = config if isinstance(config, dict) else {}
    if str(config.get("kind")).startswith(SMALL_KINDS):  # it has unet/ and vae/ too
        return "small"
    if all((folder / part / CONFIG_FILE).is_file() for part in ("unet", "vae")):
        return "sd_folder"
    return "controlnet" if config.get("_class_name") == CLASS_NAME else "unknown"


def is_small(folder: Path) -> bool:
    """Whether the ControlNet in a folder is of other widths than Stable Diffusion's, so for a small base model."""
    config, sd = (read_json(path / CONFIG_FILE) for path in (Path(folder), SD14 / "unet"))
    return list(config.get("block_out_channels", sd["block_out_channels"])) != sd["block_out_channels"]


def holds_base(path: Path) -> bool:
    """Whether the ControlNet at `path` is a whole cldm file, which holds the base's U-Net as well."""
    return not Path(path).is_dir() and any(str(key).startswith(UNET) for key in _names(Path(path)))


def _names(file: Path) -> Iterable[Any]:
    return tensor_names(file) if _is_safetensors(file) else _unwrapped(load_pickle(file, _STUBS, lazy=True))


# ----------------------------------------------------------------------------
# A base model of either kind.


def load_base(path: Path) -> LatentDiffusion:
    """The base model at `path`, without a ControlNet, on the CPU: Stable Diffusion v1.4 or a model folder of this project.

    Raises InputError if it is neither, and as `load_stable_diffusion` does.
    """
    kind = kind_of(path)
    if kind == "small":
        return load_model(path)
    if kind in ("sd_file", "sd_folder") or kind == "controlnet" and holds_base(path):
        return load_stable_diffusion(path)
    what = "a ControlNet without its base model" if kind == "controlnet" else "no base model"
    raise InputError(f"{path} is {what}: Stable Diffusion v1.4 or a model folder of this project is expected")


# ----------------------------------------------------------------------------
# Stable Diffusion.


def load_stable_diffusion(
    path: Path, *, ema: bool = False, dtype: torch.dtype = torch.float32, configs: Path = SD14
) -> LatentDiffusion:
    """Stable Diffusion v1.4 (v1.1 to v1.5 are the same networks) from a CompVis file or a diffusers folder, on the CPU.

    `ema` takes the averaged U-Net that some files carry beside the last one. `configs` is the folder that says what is expected;
    only tests have another than v1.4's. Raises InputError if a file is missing, truncated or would run code, on weights that
    do not fit (named as in the file), on another noise schedule, and on a folder whose configuration differs.
    """
    path = Path(path)
    if path.is_dir() and ema:
        raise InputError(f"{path} is a folder, which holds no averaged U-Net beside its own")
    parts = _parts_of_folder(path, configs) if path.is_dir() else _parts_of_file(path, configs, ema)
    unet, vae, text_encoder = networks = empty_networks(configs)
    for network, part in zip(networks, parts, strict=True):
        _fill(network, part, dtype)
    std = 1.0 / vae.config.scaling_factor
    return LatentDiffusion(vae, text_encoder, clip_tokenizer(), unet, noise_schedule(configs), latent_std=std)


def compvis_state(unet: nn.Module, autoencoder: nn.Module, text_encoder: nn.Module) -> State:
    """The three networks' weights as a CompVis file has them under `state_dict`; the inverse of `load_stable_diffusion`."""
    parts = ((unet, unet_names), (autoencoder, vae_names), (text_encoder, text_encoder_names))
    states = [(network.state_dict(), names) for network, names in parts]
    return {key: value for own, names in states for key, value in to_compvis(own, names(own)).items()}


class _Part(NamedTuple):
    """A network's weights, the file they are from, and the function that gives their names there from the network's own."""

    state: State
    source: Path
    names: Callable[[Iterable[str]], Names]


def _parts_of_file(path: Path, configs: Path, ema: bool) -> tuple[_Part, _Part, _Part]:
    state = _read(path)
    by_prefix = {prefix: {k: v for k, v in state.items() if k.startswith(prefix)} for prefix in (UNET, VAE, TEXT, EMA)}
    # Names without a full stop are tables of the noise schedule; a whole cldm file holds a ControlNet as well.
    strange = [key for key in state if "." in key and not key.startswith((*by_prefix, CONTROL))]
    if strange or not by_prefix[UNET]:
        found = ", ".join(strange[:3]) if strange else f"no {UNET}*"
        raise InputError(f"{path} is not a Stable Diffusion v1 file: it holds {found}")
    check_table(state.get("alphas_cumprod"), configs, path)
    unet = _Part(by_prefix[UNET], path, unet_names)
    if ema:
        counters = {f"{EMA}decay", f"{EMA}num_updates"}
        unet = _Part({k: v for k, v in by_prefix[EMA].items() if k not in counters}, path, ema_names)
    return unet, _Part(by_prefix[VAE], path, vae_names), _text_part(by_prefix[TEXT], path, TEXT)


def _parts_of_folder(folder: Path, configs: Path) -> tuple[_Part, _Part, _Part]:
    check_folder(folder, configs)
    vae, file = _folder_weights(folder / "vae")
    old = any(".query." in key for key in vae)
    return (
        _Part(*_folder_weights(folder / "unet"), _own_names),
        _Part(vae, file, old_vae_names if old else _own_names),
        _text_part(*_folder_weights(folder / "text_encoder"), ""),
    )


def _text_part(state: State, source: Path, prefix: str) -> _Part:
    """transformers 4 wrote `text_model.` before each name and a table of positions; 5 writes neither."""
    state = {key: value for key, value in state.items() if not key.endswith("embeddings.position_ids")}
    if any(key.startswith(f"{prefix}text_model.") for key in state):
        prefix += "text_model."
    return _Part(state, source, functools.partial(text_encoder_names, prefix=prefix))


def _own_names(keys: Iterable[str]) -> Names:
    return {key: key for key in keys}


def _fill(network: nn.Module, part: _Part, dtype: torch.dtype) -> None:
    state = {key: value.to(dtype) for key, value in linear_attention(part.state).items()}
    load_strict(network, state, part.source, part.names(network.state_dict()), assign=True)


# ----------------------------------------------------------------------------
# ControlNet.


def load_controlnet(path: Path, unet: "UNet2DConditionModel", *, dtype: torch.dtype = torch.float32) -> ControlNet:
    """The ControlNet of the base network `unet`, in evaluation mode on the CPU, from a diffusers folder or a single file.

    A file is a pickle or safetensors in CompVis' or diffusers' names: lllyasviel's `control_model.*`, alone or in a whole cldm
    file, `{"state_dict": ...}`, `{"controlnet_state_dict": ...}`, `{"control_model": ...}` or the bare weights. Its configuration
    is the base's. Raises InputError as `load_stable_diffusion` does, and if a folder's ControlNet is of another base.
    """
    path = Path(path)
    if path.is_dir():
        config, part = control_config(path / CONFIG_FILE, unet), _Part(*_folder_weights(path), _own_names)
    else:
        config, part = {**unet.config, "_class_name": CLASS_NAME}, _control_part(path)
    try:
        with torch.device("meta"):
            control = ControlNet.from_config(config)
    except InputError as error:
        raise InputError(f"{path} holds no ControlNet for this model: {error}") from None
    _fill(control, part, dtype)
    return control.eval()


def _control_part(path: Path) -> _Part:
    state = _read(path)
    prefix = CONTROL if any(key.startswith(CONTROL) for key in state) else ""
    state = {key: value for key, value in state.items() if key.startswith(prefix)}
    if prefix + _HINT_COMPVIS in state:
        return _Part(state, path, functools.partial(unet_names, prefix=prefix))
    if prefix + _HINT_DIFFUSERS in state:
        return _Part(state, path, lambda keys: {key: prefix + key for key in keys})
    raise InputError(f"{path} holds no ControlNet: neither {CONTROL}{_HINT_COMPVIS} nor {_HINT_DIFFUSERS} is in it")


# ----------------------------------------------------------------------------
# Reading.


def _is_safetensors(path: Path) -> bool:
    """By content: eight bytes that give a length, then JSON. Raises InputError if there is no file."""
    try:
        with open(path, "rb") as file:
            return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"
    except OSError:
        raise InputError(f"the weight file {path} does not exist or cannot be read") from None


def _read(path: Path) -> State:
    """The weights in a file of any of the forms. Raises InputError if it holds something else."""
    state = load_tensors(path)[0] if _is_safetensors(path) else _unwrapped(load_pickle(path, _STUBS))
    if not state or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise InputError(f"{path} does not hold a dict of named weights")
    return state


def _unwrapped(content: Any) -> dict[Any, Any]:
    """The innermost dict of a checkpoint that nests its weights; empty if there is none."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            return dict(content)
        content = inner
    return {}


def _folder_weights(folder: Path) -> tuple[State, Path]:
    """The weights in a part of a diffusers folder, and the file they are from."""
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return _read(folder / name), folder / name
    raise InputError(
        f"the folder {folder} holds no weights: neither diffusion_pytorch_model nor model, .safetensors or .bin"
    )
