"""An open_clip CLIP with its tokenizer and preprocessing: images and texts to unit vectors."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.checkpoint import state_hash
from common.clip.fingerprint import uses_quick_gelu

if TYPE_CHECKING:
    from PIL import Image


@dataclasses.dataclass(frozen=True)
class Clip:
    """A CLIP ready for use, on its device and in evaluation mode."""

    network: nn.Module
    """open_clip's network."""
    tokenize: Callable[[list[str]], Tensor]
    """Texts to token ids, long [N, context length]."""
    preprocess: Callable[["Image.Image"], Tensor]
    """A PIL image to the network's input, float32 [3, S, S]."""
    name: str
    """open_clip's name of the model, or its folder."""
    pretrained: str
    """Tag, file or folder of the weights."""
    folder: Path | None = None
    """The model folder, if the model was loaded from one."""

    @property
    def device(self) -> torch.device:
        """The network's device."""
        return next(self.network.parameters()).device

    @property
    def scale(self) -> float:
        """The factor of cosines before the softmax, the inverse of the learned temperature."""
        return self.network.logit_scale.exp().item()

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Unit vectors float32 [N, D], on the CPU, of preprocessed pictures [N, 3, S, S]."""
        return F.normalize(self.network.encode_image(pixels.to(self.device)).float(), dim=-1).cpu()

    def cut_texts(self, texts: Sequence[str]) -> list[str]:
        """The texts that `encode_texts` cuts, since they have more tokens than the context."""
        ids = self.tokenize(list(texts))
        length = ids.shape[1]
        full = [text for text, row in zip(texts, ids, strict=True) if row[-1] != 0]
        if not full:
            return []
        longer = self.tokenize(full, context_length=length + 1)
        cut = (longer[:, :length] != self.tokenize(full)).any(1)
        return [text for text, each in zip(full, cut.tolist(), strict=True) if each]

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Unit vectors float32 [N, D], on the CPU, of texts."""
        ids = self.tokenize(list(texts)).to(self.device)
        return F.normalize(
            torch.cat(
                [encode_tokens(self.network, part) for part in ids.split(batch_size)]
            ).float(),
            dim=-1,
        ).cpu()

    @functools.cached_property
    def identity(self) -> str:
        """A hash of the weights, activation and preprocessing, the key of cached image features."""
        parts = (
            state_hash(self.network),
            repr(self.preprocess),
            str(uses_quick_gelu(self.network)),
        )
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def encode_tokens(network: nn.Module, ids: Tensor) -> Tensor:
    """Text features [N, D], not normalised, of token ids [N, context length].

    A causal text encoder pools at the end token, so positions after the longest text of the batch
    do not affect the result. They are left out, which is several times faster.
    """
    import open_clip

    if (
        type(network) is not open_clip.CLIP
        or network.text_pool_type != "argmax"
        or network.attn_mask is None
    ):
        return network.encode_text(ids)
    ends = ids.argmax(dim=1)
    length = int(ends.max()) + 1
    # [N, L, W]
    x = network.token_embedding(ids[:, :length]) + network.positional_embedding[:length]
    x = network.ln_final(network.transformer(x, attn_mask=network.attn_mask[:length, :length]))
    pooled = x[torch.arange(len(x), device=x.device), ends]
    projection = network.text_projection
    return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
