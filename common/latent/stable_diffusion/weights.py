"""Reading weights from Stable Diffusion's file formats: pickles, safetensors, diffusers folders.

A pickle may nest its weights inside other dicts.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.checkpoint import load_pickle, load_strict, load_tensors, tensor_names
from common.errors import InputError
from common.latent.stable_diffusion.naming import Names, State, linear_attention

_WRAPPERS = ("state_dict", "controlnet_state_dict", "control_model")
_WEIGHT_FILES = tuple(
    f"{stem}{variant}{suffix}"
    for suffix in ("safetensors", "bin")
    for variant in (".", ".fp16.")
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model")
)


class _ModelCheckpoint:
    """Stand-in for the Lightning class that is a key of `callbacks` in the published v1 files."""


_STUBS = ((_ModelCheckpoint, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),)


class Part(NamedTuple):
    """The weights of one network and where they come from."""

    state: State
    """Weights by their names in the file."""
    source: Path
    """File of the weights, for error messages."""
    names: Callable[[Iterable[str]], Names]
    """Function from the network's own keys to {own key: key in the file}."""


def own_names(keys: Iterable[str]) -> Names:
    """The name table of a file that uses the network's own names."""
    return {key: key for key in keys}


def fill(network: nn.Module, part: Part, dtype: torch.dtype) -> None:
    """Loads weights as `dtype` into a network, which may be on the meta device.

    Raises InputError that names the weights that do not fit.
    """
    state = {key: value.to(dtype) for key, value in linear_attention(part.state).items()}
    load_strict(network, state, part.source, part.names(network.state_dict()), assign=True)


# ----------------------------------------------------------------------------
# Reading.


def _is_safetensors(path: Path) -> bool:
    """Whether the file is safetensors, by its suffix or its content: 8 bytes of length, then JSON.

    Raises InputError if there is no such file.
    """
    try:
        with open(path, "rb") as file:
            return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"
    except OSError:
        raise InputError(f"the weight file {path} does not exist or cannot be read") from None


def read_weights(path: Path) -> State:
    """The weights in a file of any of these formats.

    Raises InputError if the file holds something else.
    """
    state = (
        load_tensors(path)[0] if _is_safetensors(path) else _unwrapped(load_pickle(path, _STUBS))
    )
    if not state or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise InputError(f"{path} does not hold a dict of named weights")
    return state


def _unwrapped(content: Any) -> dict[Any, Any]:
    """The innermost dict of a checkpoint with nested weights; empty if there is no dict."""
    while isinstance(content, Mapping):
        inner = next(
            (content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None
        )
        if inner is None:
            return dict(content)
        content = inner
    return {}


def read_folder(folder: Path) -> tuple[State, Path]:
    """The weights in a part of a diffusers folder, such as unet/, and the file that they come from.

    Raises InputError if the folder holds no weights.
    """
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return read_weights(folder / name), folder / name
    raise InputError(
        f"the folder {folder} holds no weights: neither diffusion_pytorch_model nor model,"
        " .safetensors or .bin"
    )


def weight_names(file: Path) -> list[Any]:
    """The names of the weights in a file; the values are not read if the format allows that."""
    return (
        tensor_names(file)
        if _is_safetensors(file)
        else list(_unwrapped(load_pickle(file, _STUBS, lazy=True)))
    )
