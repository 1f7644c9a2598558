"""Tokenizer and text encoder of diffusion models: transformers' classes from open_clip's CLIPs.

open_clip pads with 0, but Stable Diffusion was trained on padding with the end token, and
cross-attention uses every position. Outside open_clip, texts are therefore tokenized by
`clip_tokenizer`.
"""

import functools
import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from common.checkpoint import build_network, load_strict, save_tensors
from common.clip.config import TRANSFORMERS_TOWER
from common.clip.formats import to_transformers, transformers_config
from common.clip.loading import load_folder
from common.config import check_entries, read_entries
from common.errors import InputError
from common.files import make_folder, write_json
from common.versions import (
    TEXT_PREFIX,
    new_text_model,
    new_tokenizer,
    text_prefix,
    without_positions,
)
from common.weights import read_weights, weights_file

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

WEIGHTS = "model.safetensors"


def load_text_tower(folder: Path) -> "tuple[CLIPTokenizer, CLIPTextModel]":
    """Tokenizer and text encoder of a CLIP's model folder, such as checkpoints/clip_shapes.

    The text encoder is in evaluation mode on the CPU. Its input is `tokenizer(texts,
    padding="max_length", truncation=True, return_tensors="pt").input_ids`, long [N, context
    length]. Raises InputError if the folder holds no plain ViT CLIP.
    """
    network = load_folder(Path(folder), torch.device("cpu")).network
    return clip_tokenizer(network.context_length), text_tower(network)


def text_tower(network: nn.Module) -> "CLIPTextModel":
    """The text encoder of an open_clip ViT as transformers' CLIPTextModel.

    Its `last_hidden_state` conditions diffusion models.
    """
    model = new_text_model(transformers_config(network).text_config)
    state = {
        name: value
        for name, value in to_transformers(network.state_dict()).items()
        if name.startswith(TEXT_PREFIX)
    }
    _fill(model, state, "the open_clip model")
    return model


def save_text_encoder(
    folder: Path, model: "CLIPTextModel", dtype: torch.dtype = torch.float16
) -> None:
    """Writes a text encoder to its own folder, which `load_text_encoder` reads."""
    make_folder(folder)
    save_tensors(
        Path(folder) / WEIGHTS,
        {name: value.to(dtype) for name, value in model.state_dict().items()},
    )
    write_json(Path(folder) / "config.json", model.config.to_dict())


def load_text_encoder(folder: Path) -> "tuple[CLIPTokenizer, CLIPTextModel]":
    """Tokenizer and text encoder (float32) of a folder that holds a CLIPTextModel only.

    An example is text_encoder/ of a diffusers folder. Raises InputError if the folder holds
    something else.
    """
    path = Path(folder) / "config.json"
    config = read_entries(path, {})
    if config.get("model_type") != "clip_text_model":
        raise InputError(f"{path} does not describe a CLIPTextModel")
    check_entries(config, TRANSFORMERS_TOWER, path)
    weights = weights_file(Path(folder))
    model = build_network(lambda: new_text_model(config), path, "a CLIPTextModel", weights)
    _fill(model, without_positions(read_weights(weights)), weights)
    return clip_tokenizer(model.config.max_position_embeddings), model


def _fill(model: "CLIPTextModel", state: Mapping[str, Tensor], source: Path | str) -> None:
    """Loads weights into the model; either may have names with or without TEXT_PREFIX."""
    prefix = text_prefix(model.state_dict())
    load_strict(
        model,
        {prefix + name.removeprefix(TEXT_PREFIX): value for name, value in state.items()},
        source,
    )


def clip_tokenizer(context_length: int = 77) -> "CLIPTokenizer":
    """transformers' CLIPTokenizer built from open_clip's BPE file.

    It gives the same ids as open_clip's, but pads with the end token, as Stable Diffusion does.
    """
    return new_tokenizer(*_byte_pairs(), context_length)


@functools.cache
def _byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary {token: id} and the BPE merges of CLIP's tokenizer."""
    from open_clip.tokenizer import bytes_to_unicode, default_bpe

    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    letters = list(bytes_to_unicode().values())
    words = letters + [letter + "</w>" for letter in letters] + [a + b for a, b in merges]
    return {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}, merges
