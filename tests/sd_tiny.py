"""Stable Diffusion of a toy's size in the structure and files of v1.4, random all over so that no
two weights can be confused."""

import contextlib
import math
import re
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.checkpoint import load_strict
from common.files import read_json, write_json
from common.latent.stable_diffusion.naming import (
    TEXT,
    UNET,
    Names,
    State,
    text_encoder_names,
    unet_names,
    vae_names,
)
from common.latent.stable_diffusion.sd14 import SD14, empty_networks, noise_schedule

TINY = {
    "unet/config.json": {
        "attention_head_dim": 2,
        "block_out_channels": [8, 16, 24],
        "cross_attention_dim": 12,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 8,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    },
    "vae/config.json": {
        "block_out_channels": [4, 8, 12],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 32,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
    },
    "text_encoder/config.json": {
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    },
    "scheduler/scheduler_config.json": {},
}
LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint"
Networks = tuple[nn.Module, nn.Module, nn.Module]


def tiny_configs(folder: Path) -> Path:
    """v1.4's configurations with the sizes changed."""
    for name, changes in TINY.items():
        write_json(folder / name, {**read_json(SD14 / name), **changes})
    return folder


def random_networks(configs: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Networks:
    """U-Net, autoencoder and text encoder whose every weight is random."""
    generator = torch.Generator().manual_seed(seed)
    networks = empty_networks(configs)
    for network in networks:
        load_strict(network, random_state(network, generator, dtype), "random", assign=True)
        network.eval()
    return networks


def random_state(
    network: nn.Module, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Values that keep activations of order 1, rounded to half precision: uniform, since that is
    the cheapest to draw."""
    state = {}
    for name, like in network.state_dict().items():
        value = torch.empty(like.shape)
        if value.dim() == 1:
            low, high = (0.8, 1.2) if name.endswith("weight") else (-0.1, 0.1)
        else:
            high = 0.7 * math.sqrt(3.0 / value[0].numel())
            low = -high
        state[name] = value.uniform_(low, high, generator=generator).half().to(dtype)
    return state


def to_compvis(state: Mapping[str, Tensor], names: Names) -> State:
    """A network's weights under CompVis' names; the autoencoder's attention becomes 1x1
    convolutions [C, C, 1, 1]."""
    one_by_one = re.compile(r"\.attn_1\.(q|k|v|proj_out)\.weight$")
    return {
        names[key]: value[:, :, None, None] if one_by_one.search(names[key]) else value
        for key, value in state.items()
    }


def compvis_state(unet: nn.Module, autoencoder: nn.Module, text_encoder: nn.Module) -> State:
    """The three networks' weights as a CompVis file has them under `state_dict`; the inverse of
    `load_stable_diffusion`."""
    parts = ((unet, unet_names), (autoencoder, vae_names), (text_encoder, text_encoder_names))
    states = [(network.state_dict(), names) for network, names in parts]
    return {
        key: value for own, names in states for key, value in to_compvis(own, names(own)).items()
    }


def published_form(
    state: Mapping[str, Tensor], averaged: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """What the published file holds: tables, positions, averaged weights and, beside the weights, a
    class of Lightning."""
    ema = dict(averaged or {key: value for key, value in state.items() if key.startswith(UNET)})
    extra = {
        "betas": noise_schedule().betas.float(),
        "alphas_cumprod": noise_schedule().alphas_cumprod.float(),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(470000),
        TEXT + "text_model.embeddings.position_ids": torch.arange(77)[None],
        **{
            "model_ema." + key.removeprefix("model.").replace(".", ""): value
            for key, value in ema.items()
        },
    }
    callbacks = (
        {sys.modules[LIGHTNING].ModelCheckpoint: {"best_model_score": None}}
        if LIGHTNING in sys.modules
        else {}
    )
    return {
        "epoch": 1,
        "global_step": 470000,
        "state_dict": {**state, **extra},
        "callbacks": callbacks,
    }


@contextlib.contextmanager
def lightning_installed(class_name: str = "ModelCheckpoint") -> Iterator[None]:
    """As if the library were there, for writing a file that names its class; the reader does
    without."""
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", LIGHTNING]
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update({name: types.ModuleType(name) for name in names})
    setattr(sys.modules[LIGHTNING], class_name, type(class_name, (), {"__module__": LIGHTNING}))
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def save_published(path: Path, networks: Networks, averaged: nn.Module | None = None) -> Path:
    """The networks as sd-v1-4-full-ema.ckpt has them."""
    ema = None
    if averaged is not None:
        own = averaged.state_dict()
        ema = to_compvis(own, unet_names(own))
    with lightning_installed():
        torch.save(published_form(compvis_state(*networks), ema), path)
    return path
