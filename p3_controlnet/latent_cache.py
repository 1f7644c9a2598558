"""Latent cache: latents, hints and text features, computed once before a training.

The trainings of the U-Net and of ControlNet read the cache instead of images and captions. This is
possible because the autoencoder and the text encoder are frozen.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import cached_tensors
from common.data.examples import Examples
from common.devices import has_room
from common.images import to_model_range
from common.latent.model import LatentDiffusion
from common.progress import Progress
from common.training import Batch

CHUNK = 64  # images or captions encoded at a time


@dataclasses.dataclass(frozen=True)
class LatentCache:
    """Latents, text features and hints of N examples; equal captions are stored once."""

    latents: Tensor
    """float16 [N, C, h, w]: means of the autoencoder's posterior, normalised."""
    contexts: Tensor
    """float16 [K, L, D]: text features of the K distinct captions."""
    caption: Tensor
    """long [N]: index into `contexts` for each example."""
    null: Tensor
    """float16 [L, D]: text features of the empty prompt."""
    hints: Tensor | None = None
    """uint8 [N, 1, H, W]: control images; None if the examples have none."""

    def __len__(self) -> int:
        return len(self.latents)

    def take(self, index: Tensor) -> Batch:
        """The batch of the examples at `index`, long [B].

        Its keys are "index", "latent" [B, C, h, w], "context" [B, L, D] and, if the examples have
        control images, "hint" uint8 [B, 1, H, W].
        """
        index = index.to(self.latents.device)
        batch = {
            "index": index,
            "latent": self.latents[index],
            "context": self.contexts[self.caption[index]],
        }
        return batch if self.hints is None else batch | {"hint": self.hints[index]}

    def resident(self, device: torch.device) -> "LatentCache":
        """The cache on `device` if it fits there (see `common.devices.has_room`), else itself."""
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if not has_room(device, [value for value in tensors.values() if value is not None]):
            return self
        return LatentCache(
            **{name: None if value is None else value.to(device) for name, value in tensors.items()}
        )

    @classmethod
    def cached(
        cls, path: Path, made_from: Mapping[str, Any], make: Callable[[], "LatentCache"]
    ) -> "LatentCache":
        """Reads the cache from the file `path`; if the file is missing, calls `make` and writes it.

        `made_from` describes the data and the networks. Raises InputError if the file was made from
        something else.
        """

        def tensors() -> dict[str, Tensor]:
            cache = make()
            values = {field.name: getattr(cache, field.name) for field in dataclasses.fields(cache)}
            return {name: value for name, value in values.items() if value is not None}

        return cls(**cached_tensors(path, made_from, tensors))


@torch.no_grad()
def make_latent_cache(model: LatentDiffusion, examples: Examples) -> LatentCache:
    """Encodes examples into a cache on the CPU.

    The images' sides must be multiples of the model's downscaling factor.
    """
    device = model.unet.device
    captions = sorted(set(examples.captions))
    number = {caption: k for k, caption in enumerate(captions)}
    latents = [
        model.encode(to_model_range(part).to(device)).half().cpu()
        for part in _shown(examples.images.split(CHUNK), "encoding images")
    ]
    parts = [captions[i : i + CHUNK] for i in range(0, len(captions), CHUNK)]
    contexts = [model.encode_text(part).half().cpu() for part in _shown(parts, "encoding captions")]
    return LatentCache(
        torch.cat(latents),
        torch.cat(contexts),
        torch.tensor([number[caption] for caption in examples.captions]),
        model.encode_text([""])[0].half().cpu(),
        examples.hints,
    )


def _shown(parts: Iterable[Any], what: str) -> Iterable[Any]:
    return Progress(parts, desc=what, unit="chunks")
