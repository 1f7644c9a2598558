"""What a training of the U-Net or of ControlNet reads instead of pictures and captions: latents,
hints and text features.

The autoencoder and the text encoder are frozen, so each picture and each caption goes through them
once.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from common.checkpoint import cached_tensors
from common.data.examples import Examples
from common.devices import has_room
from common.images import to_model_range
from common.latent.model import LatentDiffusion
from common.training import Batch

CHUNK = 64


@dataclasses.dataclass(frozen=True)
class LatentCache:
    """Frozen features of N examples, on the CPU. Captions that come more than once are stored
    once."""

    latents: Tensor
    """float16 [N, C, h, w]: posterior means, normalised."""
    contexts: Tensor
    """float16 [K, L, D]: text features of the K different captions."""
    caption: Tensor
    """long [N]: which caption belongs to an example."""
    null: Tensor
    """float16 [L, D]: text features of the empty prompt."""
    hints: Tensor | None = None
    """uint8 [N, 1, H, W]: control images, where the examples have any."""

    def __len__(self) -> int:
        return len(self.latents)

    def take(self, index: Tensor) -> Batch:
        """The examples `index` as a batch: "index", "latent", "context" and, where there are any,
        "hint" (uint8)."""
        index = index.to(self.latents.device)
        batch = {
            "index": index,
            "latent": self.latents[index],
            "context": self.contexts[self.caption[index]],
        }
        return batch if self.hints is None else batch | {"hint": self.hints[index]}

    def resident(self, device: torch.device) -> "LatentCache":
        """The cache on the device, if there is room for it; else itself."""
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
        """The cache in the file `path`, which is made where it is missing. Raises InputError if it
        was made from something else."""

        def tensors() -> dict[str, Tensor]:
            cache = make()
            values = {field.name: getattr(cache, field.name) for field in dataclasses.fields(cache)}
            return {name: value for name, value in values.items() if value is not None}

        return cls(**cached_tensors(path, made_from, tensors))


@torch.no_grad()
def make_latent_cache(model: LatentDiffusion, examples: Examples) -> LatentCache:
    """Encodes examples; pictures of the model's size."""
    device = model.unet.device
    captions = sorted(set(examples.captions))
    number = {caption: k for k, caption in enumerate(captions)}
    latents = [
        model.encode(to_model_range(part).to(device)).half().cpu()
        for part in _shown(examples.images.split(CHUNK), "encoding pictures")
    ]
    parts = [captions[i : i + CHUNK] for i in range(0, len(captions), CHUNK)]
    contexts = [model.encode_text(part).half().cpu() for part in _shown(parts, "reading captions")]
    return LatentCache(
        torch.cat(latents),
        torch.cat(contexts),
        torch.tensor([number[caption] for caption in examples.captions]),
        model.encode_text([""])[0].half().cpu(),
        examples.hints,
    )


def _shown(parts: Iterable[Any], what: str) -> Iterable[Any]:
    return tqdm(parts, desc=what, unit="chunk", dynamic_ncols=True)
