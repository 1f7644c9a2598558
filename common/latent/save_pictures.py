"""Generates pictures into files, split among processes; finished pictures are kept on a rerun."""

import dataclasses
import functools
import hashlib
import json
import os
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from common.checkpoint import state_hash, tensors_hash
from common.devices import this_process
from common.diffusion.process import Network
from common.diffusion.samplers import Callback
from common.errors import InputError
from common.files import check_targets, make_folder
from common.images import NOTE, check_replaceable, read_note, resize, to_uint8, write_png
from common.latent.generate import GenerationConfig, Request, generate, with_default_guidance
from common.latent.model import LatentDiffusion
from common.memory import require_memory

Value = TypeVar("Value")
Item = TypeVar("Item")


class Picture(NamedTuple):
    """A picture to generate: its file and its request."""

    path: str | Path
    request: Request


class Mapped(Sequence[Item]):
    """The sequence of `function(value)` for the values; each is made when it is used, and not kept.

    A job of many pictures takes memory for those in work only.
    """

    def __init__(self, function: Callable[[Value], Item], values: Sequence[Value]) -> None:
        self.function, self.values = function, values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Mapped(self.function, self.values[index])
        return self.function(self.values[index])


def draw_missing(
    model: LatentDiffusion,
    pictures: Sequence[Picture],
    config: GenerationConfig,
    size: int,
    *,
    settings: Mapping[str, Any] | None = None,
    latent_side: int | None = None,
    network: Network | None = None,
    staging: Path | None = None,
) -> None:
    """Writes the pictures that do not exist yet, as PNG of `size` x `size` pixels.

    Each process writes its share. An existing picture is kept if its file is complete and it was
    made for the same request by the same networks with the same settings; `settings` are those that
    `config` does not hold. Prints how many pictures were kept, and warns of prompts that are too
    long for the text encoder. `latent_side` and `network` are passed to `generate`, `staging` to
    `write_png`. Raises InputError, before anything is drawn, if a file cannot be written, a picture
    of another source would be replaced, or the pictures do not fit into memory.
    """
    require_memory(size**2 * 3 * (config.chunk_size + 8), f"a chunk of {size}x{size} pictures")
    rank, processes, _ = this_process()
    made_with = _made_with(model, config, {"size": size, **(settings or {})})
    mine = range(len(pictures))[rank::processes]  # does not depend on which files exist
    prompts: set[str] = set()
    paths: list[str] = []
    todo: list[int] = []
    for i, picture in enumerate(pictures):
        prompts.add(picture.request.prompt)
        paths.append(os.fspath(picture.path))
        if not paths[-1].lower().endswith(".png"):
            raise InputError(
                f"the target {picture.path} must end in .png, since PNG files are written"
            )
        if i in mine and not _is_kept(picture, made_with):
            check_replaceable(picture.path)
            todo.append(i)
    check_targets(paths)
    missing = Mapped(pictures.__getitem__, todo)
    for prompt in too_long(model, prompts) if rank == 0 else ():
        print(
            "warning: the prompt is cut to the text encoder's"
            f" {model.tokenizer.model_max_length} tokens: {textwrap.shorten(prompt, 200)!r}",
            file=sys.stderr,
        )
    if kept := len(mine) - len(missing):
        print(f"{kept} of {len(pictures)} pictures are there already")
    chunks = draw(
        model,
        Mapped(lambda picture: picture.request, missing),
        config.for_job(len(pictures)),
        size,
        latent_side=latent_side,
        network=network,
        show_progress=rank == 0,
    )
    for indices, images in chunks:
        for i, image in zip(indices, images, strict=True):
            path, request = missing[i]
            make_folder(Path(path).parent)
            write_png(Path(path), image, staging, (NOTE, _note(made_with, request)))


def _is_kept(picture: Picture, made_with: str) -> bool:
    """Whether the file is complete and was made for this request with these settings."""
    return os.path.isfile(picture.path) and read_note(picture.path, NOTE) == _note(
        made_with, picture.request
    )


def too_long(model: LatentDiffusion, prompts: Collection[str]) -> list[str]:
    """The prompts that `LatentDiffusion.tokenize` truncates, sorted."""
    tokenizer = model.tokenizer
    room = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()

    # Counting whole prompts is slow, and their words repeat. A token has at least one letter, and
    # no token but a placeholder holds a space, so the sum over the words is never too small.
    @functools.lru_cache(maxsize=10_000)
    def most_tokens(word: str) -> int:
        return len(tokenizer.tokenize(word) if word.isalpha() or not word.isascii() else word)

    return sorted(
        prompt
        for prompt in prompts
        if sum(map(most_tokens, prompt.split())) > room and len(tokenizer.tokenize(prompt)) > room
    )


def draw(
    model: LatentDiffusion,
    requests: Sequence[Request],
    config: GenerationConfig,
    size: int,
    *,
    latent_side: int | None = None,
    network: Network | None = None,
    callback: Callback | None = None,
    show_progress: bool = True,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yields (indices of requests, pictures uint8 [n, 3, size, size]) for each chunk.

    The chunks are those of `generate`, which also gets `callback`.
    """
    chunks = generate(
        model,
        requests,
        config,
        latent_side,
        network=network,
        callback=callback,
        show_progress=show_progress,
    )
    for indices, images in chunks:
        yield indices, torch.stack([resize(to_uint8(image), size) for image in images])


def _made_with(
    model: LatentDiffusion, config: GenerationConfig, settings: Mapping[str, Any]
) -> str:
    """All that pictures depend on except their requests, as JSON."""
    parts = (model.unet, model.controlnet, model.autoencoder, model.text_encoder)
    networks = nn.ModuleList([part for part in parts if part is not None])
    sampling = dataclasses.asdict(with_default_guidance(config, model))
    if sampling.get("control_text", "") is None and model.controlnet is not None:
        sampling["control_text"] = model.controlnet.control_text
    numbers = (model.latent_mean, model.latent_std, model.schedule.alphas_cumprod)
    return json.dumps(
        {
            "networks": state_hash(networks),
            "parameterization": model.parameterization,
            "numbers": tensors_hash(*numbers),
            **sampling,
            **settings,
        }
    )


def _note(made_with: str, request: Request) -> str:
    """A hash of the networks, the settings and the request."""
    digest = hashlib.blake2b(
        json.dumps([made_with, request.prompt, request.derive_seed()]).encode(), digest_size=16
    )
    if (hint := request.read_hint()) is not None:
        digest.update(hint.numpy().tobytes())
    return digest.hexdigest()
