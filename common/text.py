"""The tokenizer and the text tower that condition diffusion models, as transformers' classes, from open_clip's CLIPs.

open_clip pads with 0, but Stable Diffusion was trained on padding with the end token, and cross-attention sees every position:
outside open_clip texts go through `clip_tokenizer`.
"""

import functools
import gzip
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from common.checkpoint import load_strict
from common.clip import load_folder
from common.clip.formats import to_transformers, transformers_config

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer


def load_text_tower(folder: Path) -> "tuple[CLIPTokenizer, CLIPTextModel]":
    """The tokenizer and the text tower, in evaluation mode on the CPU, of a CLIP's model folder such as checkpoints/clip_shapes.

    `tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids` are the tower's input: as many
    positions as it has. Raises InputError if the folder holds no plain ViT CLIP.
    """
    network = load_folder(Path(folder), torch.device("cpu")).network
    return clip_tokenizer(network.context_length), text_tower(network)


def text_tower(network: nn.Module) -> "CLIPTextModel":
    """The text tower of an open_clip ViT as transformers' CLIPTextModel; `last_hidden_state` conditions diffusion models."""
    from transformers import CLIPTextModel

    model = CLIPTextModel(transformers_config(network).text_config).eval()
    state = to_transformers(network.state_dict())
    prefix = "text_model."
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if next(iter(model.state_dict())).startswith(prefix):  # transformers before 5
        own = {prefix + name: value for name, value in own.items()}
    load_strict(model, own, "the open_clip model")
    return model


def clip_tokenizer(context_length: int = 77) -> "CLIPTokenizer":
    """transformers' CLIPTokenizer from open_clip's BPE file: the same ids, padded with the end token as Stable Diffusion's."""
    from transformers import CLIPTokenizer

    vocabulary, merges = _byte_pairs()
    return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), model_max_length=context_length)


@functools.cache
def _byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    from open_clip.tokenizer import bytes_to_unicode, default_bpe

    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    letters = list(bytes_to_unicode().values())
    words = letters + [letter + "</w>" for letter in letters] + [a + b for a, b in merges]
    return {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}, merges
