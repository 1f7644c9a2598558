"""Generates pictures into files, split among processes; finished pictures are kept on a rerun."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.checkpoint import state_hash
from common.devices import this_process
from common.diffusion.process import Network
from common.diffusion.samplers import Callback
from common.files import make_folder
from common.images import read_note, resize, to_uint8, write_png
from common.latent.generate import GenerationConfig, Request, generate, with_default_guidance
from common.latent.model import LatentDiffusion

NOTE = "made with"
"""Name of the PNG text entry that identifies how a picture was made."""


class Picture(NamedTuple):
    """A picture to generate: its file and its request."""

    path: Path
    request: Request


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
    `write_png`.
    """
    rank, processes, _ = this_process()
    for prompt in (
        too_long(model, {picture.request.prompt for picture in pictures}) if rank == 0 else ()
    ):
        print(
            "warning: the prompt is cut to the text encoder's"
            f" {model.tokenizer.model_max_length} tokens: {prompt!r}",
            file=sys.stderr,
        )
    # The split does not depend on which files exist.
    mine = pictures[rank::processes]
    made_with = _made_with(model, config, {"size": size, **(settings or {})})
    notes = [_note(made_with, picture.request) for picture in mine]
    missing = [
        (picture, note)
        for picture, note in zip(mine, notes, strict=True)
        if read_note(picture.path, NOTE) != note
    ]
    if kept := len(mine) - len(missing):
        print(f"{kept} of {len(pictures)} pictures are there already")
    for path in {picture.path.parent for picture, _ in missing}:
        make_folder(path)
    requests = [picture.request for picture, _ in missing]
    chunks = draw(
        model,
        requests,
        config,
        size,
        latent_side=latent_side,
        network=network,
        show_progress=rank == 0,
    )
    for indices, images in chunks:
        for i, image in zip(indices, images, strict=True):
            picture, note = missing[i]
            write_png(picture.path, image, staging, (NOTE, note))


def too_long(model: LatentDiffusion, prompts: Collection[str]) -> list[str]:
    """The prompts that `LatentDiffusion.tokenize` truncates, sorted."""
    tokenizer = model.tokenizer
    room = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
    return sorted(prompt for prompt in prompts if len(tokenizer.tokenize(prompt)) > room)


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
    return json.dumps(
        {
            "networks": state_hash(networks),
            **dataclasses.asdict(with_default_guidance(config, model)),
            **settings,
        }
    )


def _note(made_with: str, request: Request) -> str:
    """A hash of the networks, the settings and the request."""
    digest = hashlib.blake2b(
        json.dumps([made_with, request.prompt, request.seed]).encode(), digest_size=16
    )
    if request.hint is not None:
        digest.update(request.hint.numpy().tobytes())
    return digest.hexdigest()
