"""Drawing pictures into files: shared out among processes, and resumed, since a finished picture is
recognised and kept."""

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
from common.files import make_folder
from common.images import read_note, resize, to_uint8, write_png
from common.latent.generate import GenerationConfig, Request, generate, with_default_guidance
from common.latent.model import LatentDiffusion

NOTE = "made with"
"""The PNG's text entry by which a finished picture is recognised."""


class Picture(NamedTuple):
    """A picture to draw, and where it belongs."""

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
    """Writes the pictures, `size` pixels wide and high, that are not there already, each process
    its share, and says what was kept, and which prompts are too long for the text encoder.

    A picture is kept if it is whole and was drawn for the same request by the same networks with
    the same settings; `settings` are those that `config` does not hold. `latent_side` and `network`
    are for `generate`, `staging` for `write_png`.
    """
    rank, processes, _ = this_process()
    for prompt in (
        too_long(model, {picture.request.prompt for picture in pictures}) if rank == 0 else ()
    ):
        print(
            f"warning: only the first {model.tokenizer.model_max_length} tokens count of"
            f" {prompt!r}",
            file=sys.stderr,
        )
    # Which process draws a picture depends on no file.
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
    """The prompts that `LatentDiffusion.tokenize` cuts, sorted."""
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
    show_progress: bool = True,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yields (indices of requests, pictures uint8 [n, 3, size, size]) chunk by chunk; see
    `generate`."""
    chunks = generate(
        model, requests, config, latent_side, network=network, show_progress=show_progress
    )
    for indices, images in chunks:
        yield indices, torch.stack([resize(to_uint8(image), size) for image in images])


def _made_with(
    model: LatentDiffusion, config: GenerationConfig, settings: Mapping[str, Any]
) -> str:
    """All that pictures depend on, but for their own requests."""
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
    digest = hashlib.blake2b(
        json.dumps([made_with, request.prompt, request.seed]).encode(), digest_size=16
    )
    if request.hint is not None:
        digest.update(request.hint.numpy().tobytes())
    return digest.hexdigest()
