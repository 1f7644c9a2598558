"""The weights of one of Stable Diffusion's networks, and loading them into it."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from common.checkpoint import load_strict
from common.latent.stable_diffusion.naming import Names, State, linear_attention


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
    state, names = linear_attention(part.state), part.names(network.state_dict())
    load_strict(network, state, part.source, names, assign=True, dtype=dtype)
